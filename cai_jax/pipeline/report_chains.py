"""Read the chains of a run for its report: D_CAI, and the answers of the models side by side."""

import itertools
import math
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from cai_jax.data import d_cai
from cai_jax.pipeline.chains import browsable
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import parse_json
from cai_jax.runtime.shapes import Shape, check_shape, optional
from cai_jax.scoring.scorer import Scorer

QUALITY_ROWS = 'quality_rows.jsonl'  # flags and scores of the responses of D_CAI
EVALUATION_ROWS = 'evaluation/rows.jsonl'  # scores of the held-out answers

_NUMBERS = {...: (float, None)}
_QUALITY_SHAPE = {
  'id': str,
  'round': int,
  optional('flags'): [str],
  optional('scores'): _NUMBERS,
}
_EVALUATION_SHAPE = {
  'model': str,
  'id': str,
  'stage': str,
  'columns': _NUMBERS,
  optional('labels'): {...: [str]},
}

NOTES = {'unvalidated': 'unvalidated judge', 'cannot tell': 'the judge cannot tell'}

Marks = Mapping[tuple[str, str, str], Mapping[str, Any]]  # by model, id and stage


def read_d_cai(
  folder: pathlib.Path, workdir: pathlib.Path, scorer: Scorer | None, limit: int
) -> list[dict[str, Any]]:
  """Return the first chains of D_CAI, with the flags and scores of their responses.

  Args:
    folder: the folder of D_CAI.
    workdir: the folder of the run; its `quality_rows.jsonl` has flags and scores.
    scorer: finds the rules that each response breaks, if there is one.
    limit: number of chains.

  Raises:
    UserError: if a file is damaged.
  """
  rows, marks = d_cai.read_rows(folder), read_quality_marks(workdir / QUALITY_ROWS)
  return [
    mark_chain(browsable(row, scorer) | {'kind': row['kind']}, '', marks)
    for row in itertools.islice(rows, limit)
  ]


def read_answers(
  folder: pathlib.Path,
  judge: Mapping[str, Any] | None,
  scorer: Scorer | None,
  limit: int,
) -> list[dict[str, Any]]:
  """Return the answers to the first held-out prompts, each by all models.

  Args:
    folder: the folder `evaluation`, with a dataset per model; those beside 'base' and 'aligned' are
      of baselines.
    judge: the results of the judge, whose verdicts are added.
    scorer: finds the rules that each response breaks, if there is one.
    limit: number of prompts.

  Raises:
    UserError: if a file is damaged.
  """
  marks = read_evaluation_marks(folder.parent / EVALUATION_ROWS)
  names = sorted(path.parent.name for path in folder.glob('*/dataset_info.json'))
  others = ['aligned', *(name for name in names if name not in ('base', 'aligned'))]
  answers = {name: {row['id']: row for row in d_cai.read_rows(folder / name)} for name in others}
  verdicts = collect_verdicts(judge)
  chains: list[dict[str, Any]] = []
  for row in d_cai.read_rows(folder / 'base'):
    if len(chains) == limit:
      break
    if row['id'] not in answers['aligned']:  # its chain ended early
      continue
    chain = mark_chain(browsable(row, scorer) | {'kind': row['kind']}, 'base', marks)
    chain['answers'] = {}
    for name in others:
      if (other := answers[name].get(row['id'])) is not None:
        answer = browsable({**other, 'rounds': []}, scorer)
        violations = {'violations': answer['violations'][0]} if 'violations' in answer else {}
        mark = marks.get((name, row['id'], 'initial'), {})
        chain['answers'][name] = {**answer['initial'], **mark, **violations}
    if row['id'] in verdicts:
      chain['verdicts'] = verdicts[row['id']]
    chains.append(chain)
  return chains


def mark_chain(chain: dict[str, Any], model: str, marks: Marks) -> dict[str, Any]:
  """Return a chain with the flags and scores of its responses.

  Args:
    chain: the chain.
    model: the model in the keys of the marks; '' for those of D_CAI.
    marks: flags and scores.
  """

  def add(response: Mapping[str, Any], number: int) -> dict[str, Any]:
    stage = f'revision_{number}' if number else 'initial'
    return {**response, **marks.get((model, chain['id'], stage), {})}

  rounds = [
    step | {'revision': add(step['revision'], number)}
    for number, step in enumerate(chain['rounds'], 1)
  ]
  return chain | {'initial': add(chain['initial'], 0), 'rounds': rounds}


def read_quality_marks(path: pathlib.Path) -> Marks:
  """Return the flags and scores of the responses of D_CAI; none if the file is missing.

  Args:
    path: the file, whose rows have `id`, `round` (-1 is the initial response) and `flags`, and
      possibly `scores`.

  Raises:
    UserError: if the file is damaged.
  """
  marks = {}
  for row in _read_lines(path, _QUALITY_SHAPE):
    stage = f'revision_{row["round"] + 1}' if row['round'] >= 0 else 'initial'
    scores = _rounded(row.get('scores', {}))
    mark: dict[str, Any] = {'flags': row.get('flags', [])}
    marks['', row['id'], stage] = mark | ({'scores': scores} if scores else {})
  return marks


def read_evaluation_marks(path: pathlib.Path) -> Marks:
  """Return the flags and scores of held-out answers; none if the file is missing.

  A rate of 1 is a flag, except for `helpful_rate` and the rate of violations, which the page shows
  as rules. So is each label, with the name of its measure.

  Args:
    path: the file, whose rows have `model`, `id`, `stage` and `columns`, and possibly `labels`.

  Raises:
    UserError: if the file is damaged.
  """
  marks = {}
  for row in _read_lines(path, _EVALUATION_SHAPE):
    names = [name for name in row['columns'] if re.fullmatch(r'(?!helpful|violation).*_rate', name)]
    flags = [name.removesuffix('_rate') for name in names if row['columns'][name] == 1]
    for name, labels in row.get('labels', {}).items():
      flags += [f'{name.removesuffix("_labels")}: {label}' for label in labels]
    columns = {k: v for k, v in row['columns'].items() if k != 'mean_tokens'}
    mark: dict[str, Any] = {'scores': _rounded(columns)}
    marks[row['model'], row['id'], row['stage']] = mark | (
      {'flags': flags} if names or flags else {}
    )
  return marks


def collect_verdicts(judge: Mapping[str, Any] | None) -> dict[str, dict[str, float]]:
  """Return a judge's mean log-odds for a response, by prompt and name of the comparison.

  Args:
    judge: the results of the judge.
  """
  verdicts: dict[str, dict[str, float]] = {}
  status = (judge or {}).get('status')
  note = '' if status == 'valid' else f' ({NOTES.get(str(status), status)})'
  for result in (judge or {}).get('comparisons', []):
    name = f'{result["criterion"]}: {result["player"]} against {result["opponent"]}{note}'
    for item in result.get('items', []):
      odds = [x for x in item['log_odds'] if math.isfinite(x)]
      if odds:
        verdicts.setdefault(item['id'], {})[name] = _round(sum(odds) / len(odds))
  return verdicts


def _read_lines(path: pathlib.Path, shape: Shape) -> Iterable[dict[str, Any]]:
  """Yield the rows of a JSON Lines file; none if it does not exist."""
  if not path.exists():
    return
  with open(path, 'rb') as file:
    for number, line in enumerate(file, 1):
      place = f'{path}, line {number}'
      try:
        row = parse_json(line)
      except (ValueError, RecursionError) as error:
        raise UserError(
          f'{place} is not valid JSON: {error}. Restore the file, or run in a new workdir.'
        ) from error
      check_shape(row, shape, place)
      yield row


def _rounded(scores: Mapping[str, Any]) -> dict[str, float]:
  return {name: _round(value) for name, value in scores.items() if value is not None}


def _round(value: float) -> float:
  """Return a number with four digits, which is all that a page shows."""
  return float(f'{value:.4g}')
