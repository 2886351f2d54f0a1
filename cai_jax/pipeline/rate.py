"""The command `rate`: export a blind rating sheet of a run, and read it back."""

import argparse
import pathlib
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cai_jax.data import d_cai
from cai_jax.evaluation.human_ratings import (
  KEY_SHAPE,
  RESULT_SHAPE,
  describe,
  find_sheet,
  name_raters,
  read_ratings,
  summarize_ratings,
)
from cai_jax.report.findings import JUDGE_SHAPE
from cai_jax.report.rating_sheet import Pair, make_sheet, write_sheet
from cai_jax.runtime.cloud.workdir import open_part, refuse_url
from cai_jax.runtime.errors import UserError, show
from cai_jax.runtime.files import read_json, write_json
from cai_jax.runtime.shapes import check_shape
from cai_jax.runtime.terminal import say

RATINGS = 'evaluation/ratings.json'
KINDS = ('all', 'harmful', 'helpful')


def run_command(program: str, arguments: Sequence[str]) -> None:
  """Run the command.

  Args:
    program: how the command is called, for the help.
    arguments: the arguments after `rate`.

  Raises:
    UserError: if the run has no answers to export, or a sheet cannot be read back.
  """
  parser = argparse.ArgumentParser(program, description=__doc__, allow_abbrev=False)
  commands = parser.add_subparsers(dest='command', required=True)
  export = commands.add_parser('export', help='write a sheet for people to fill in')
  export.add_argument('run', help='folder of a run whose evaluate stage is done')
  export.add_argument('--out', required=True, help='folder for sheet.csv and sheet.html')
  export.add_argument('--pairs', type=int, default=100, help='number of pairs (default: 100)')
  export.add_argument(
    '--compare',
    default='aligned',
    help="'aligned' (default): the aligned model with the base model; 'revision_N': the revision "
    'of round N with the initial response of the base model',
  )
  export.add_argument('--prompts', choices=KINDS, default='all', help='kind of held-out prompts')
  export.add_argument('--seed', type=int, default=0, help='seed of the draw and of the order')
  read = commands.add_parser('read', help='report what people filled in')
  read.add_argument('run', help='folder of the run that the sheet is from')
  read.add_argument('sheets', nargs='+', help='a CSV file per rater')
  options = parser.parse_args(arguments)
  refuse_url(getattr(options, 'out', ''), 'A rating sheet')
  with open_part(options.run, 'evaluation') as workdir:
    run = workdir.folder
    if options.command == 'read':
      say(describe(read_sheets(run, options.sheets)))
      place = pathlib.Path(run) / RATINGS
    else:
      key = export_sheet(
        run, options.out, options.pairs, options.compare, options.prompts, options.seed
      )
      place = _key_path(run, key['sheet'])
  if options.command == 'read':
    say(f'written to {workdir.show(str(place))}')
    say('Start the command of the run again to show them in its report.')
    return
  say(f'{len(key["pairs"])} pairs: {options.out}/sheet.html and {options.out}/sheet.csv')
  say(f'The key stays in the run: {workdir.show(str(place))}')


def export_sheet(
  run: str, out: str, count: int, compare: str = 'aligned', prompts: str = 'all', seed: int = 0
) -> dict[str, Any]:
  """Write a blind rating sheet to a folder, and its key to `evaluation/` of the run.

  Args:
    run: folder of the run.
    out: folder for the sheet.
    count: number of pairs; fewer are written if the run has fewer pairs that differ.
    compare: 'aligned' or 'revision_N'.
    prompts: one of `KINDS`.
    seed: seed of the draw of pairs and of their order.

  Returns:
    The key.

  Raises:
    UserError: if the run has no such answers, or the folder has a sheet.
  """
  if count < 1:
    raise UserError(f'--pairs is {count}. It must be at least 1.')
  pairs, left_out = list_pairs(pathlib.Path(run), compare, prompts)
  if not pairs:
    raise UserError(
      f'{run} has no pair to rate: {left_out["equal"]} pairs are equal and {left_out["blank"]} '
      'have a blank answer. Choose another --compare or --prompts.'
    )
  chosen = random.Random(seed).sample(pairs, min(count, len(pairs)))
  opponent = 'base' if compare == 'aligned' else 'initial'
  rows, key = make_sheet(chosen, (compare, opponent), seed)
  key['left_out'] = left_out
  write_sheet(out, rows)
  write_json(_key_path(run, key['sheet']), key)
  return key


def list_pairs(run: pathlib.Path, compare: str, prompts: str) -> tuple[list[Pair], dict[str, int]]:
  """Return the pairs of answers that differ, and the numbers of `equal` and `blank` ones.

  Args:
    run: folder of the run.
    compare: 'aligned' or 'revision_N'.
    prompts: one of `KINDS`.

  Raises:
    UserError: if the run has no such answers.
  """
  match = re.fullmatch(r'revision_([1-9]\d{0,3})', compare)
  if compare != 'aligned' and not match:
    raise UserError(f"--compare is {show(compare, 40)}. It must be 'aligned' or 'revision_N'.")
  number = int(match[1]) if match else 0
  for name in ('base',) if match else ('base', 'aligned'):
    if not (run / 'evaluation' / name / 'dataset_info.json').exists():
      raise UserError(
        f'{run} has no answers of the {name} model to held-out prompts. Give the folder of a run '
        'whose evaluate stage is done.'
      )
  rows = [row for row in _read(run, 'base') if prompts in ('all', row['kind'])]
  if match:
    rows = [row for row in rows if len(row['rounds']) >= number]
    answers = {row['id']: row['rounds'][number - 1]['revision']['text'] for row in rows}
  else:
    answers = {row['id']: row['initial']['text'] for row in _read(run, 'aligned')}
  if not any(row['id'] in answers for row in rows):
    raise UserError(f'{run} has no {compare} answers to {prompts} held-out prompts.')
  pairs, left_out = [], {'equal': 0, 'blank': 0}
  for row in rows:
    if row['id'] not in answers:  # its chain ended early
      continue
    responses = answers[row['id']], row['initial']['text']
    if not all(text.strip() for text in responses):
      left_out['blank'] += 1
    elif responses[0].split() == responses[1].split():
      left_out['equal'] += 1
    else:
      pairs.append(Pair(row['id'], row['kind'], format_prompt(row['prompt']), responses))
  return pairs, left_out


def _read(run: pathlib.Path, name: str) -> d_cai.Rows:
  return d_cai.read_rows(run / 'evaluation' / name)


def format_prompt(messages: Sequence[Mapping[str, str]]) -> str:
  """Return a prompt as people read it: the roles are named if there are several messages.

  Args:
    messages: the messages.
  """
  if len(messages) == 1:
    return messages[0]['content']
  return '\n\n'.join(f'{m["role"].capitalize()}: {m["content"]}' for m in messages)


def read_sheets(run: str, sheets: Sequence[str]) -> dict[str, Any]:
  """Read filled-in sheets, and write `evaluation/ratings.json` of the run.

  Args:
    run: folder of the run.
    sheets: a CSV file per rater; all belong to the same sheet.

  Returns:
    The results, see `human_ratings.summarize_ratings`.

  Raises:
    UserError: if a file is not a sheet of this run, or has a value that is not allowed.
  """
  names, folder = name_raters(sheets), pathlib.Path(run)
  sheet = find_sheet(sheets[0])
  path = _key_path(run, sheet)
  if not re.fullmatch('[0-9a-f]{8}', sheet) or not path.exists():
    raise UserError(
      f'{sheets[0]} is not a sheet of {run}, which has no key for it. Give the run that the sheet '
      'was exported from, and leave the ids as they are.'
    )
  key = read_json(path)
  check_shape(key, KEY_SHAPE, str(path))
  raters = {name: read_ratings(file, key) for name, file in zip(names, sheets, strict=True)}
  results = summarize_ratings(raters, key, _read_judge(folder / 'evaluation' / 'models.json'))
  write_json(folder / RATINGS, results)
  return results


def describe_ratings(run: pathlib.Path) -> str:
  """Return the table of the ratings of a run; '' if it has none.

  Args:
    run: folder of the run.

  Raises:
    UserError: if the file is damaged.
  """
  path = run / RATINGS
  if not path.exists():
    return ''
  results = read_json(path)
  check_shape(results, RESULT_SHAPE, str(path))
  try:
    return describe(results)
  except (ValueError, IndexError) as error:  # an interval without two ends
    raise UserError(f'{path} is damaged ({error}). Read the sheets again.') from error


def has_new_ratings(run: pathlib.Path) -> bool:
  """Return whether ratings were read after the report was written.

  Args:
    run: folder of the run.
  """
  ratings, report = run / RATINGS, run / 'report.html'
  return (
    ratings.exists() and report.exists() and ratings.stat().st_mtime_ns > report.stat().st_mtime_ns
  )


def _read_judge(path: pathlib.Path) -> dict[str, Any] | None:
  judge = read_json(path).get('judge') if path.exists() else None
  if not isinstance(judge, dict) or 'status' not in judge:
    return None
  check_shape(judge, JUDGE_SHAPE, f'{path}: judge')
  return judge


def _key_path(run: str, sheet: str) -> pathlib.Path:
  return pathlib.Path(run) / 'evaluation' / f'rating_key-{sheet}.json'
