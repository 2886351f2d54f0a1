"""The command `import`: read results of other evaluation programs into a run's table."""

import argparse
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from cai_jax.evaluation.external import READERS, read_results
from cai_jax.runtime.cloud.workdir import open_part
from cai_jax.runtime.errors import UserError, show
from cai_jax.runtime.files import read_json, write_json
from cai_jax.runtime.shapes import check_shape
from cai_jax.runtime.terminal import say

IMPORTED = 'imported.json'  # beside summary.json
_NUMBER = {
  'value': (float, None),
  'interval': ([float], None),
  'count': (int, None),
  'program': str,
  'file': str,
}
_SHAPE = {...: {...: _NUMBER}}  # by model and title


def run_command(program: str, arguments: Sequence[str]) -> None:
  """Run the command.

  Args:
    program: how the command is called, for the help.
    arguments: the arguments after `import`.

  Raises:
    UserError: if the run was not evaluated or has no such model, or a file cannot be read.
  """
  parser = argparse.ArgumentParser(program, description=__doc__, allow_abbrev=False)
  parser.add_argument('run', help='folder of a run whose evaluate stage is done')
  parser.add_argument('files', nargs='+', help=f'results of {" or ".join(READERS)}')
  parser.add_argument('--model', required=True, help="'base', 'aligned' or a baseline of the run")
  options = parser.parse_args(arguments)
  with open_part(options.run, 'evaluation') as workdir:
    numbers = import_results(workdir.folder, options.files, options.model)
  for title, number in numbers.items():
    say(f'{title}: {"–" if number["value"] is None else format(number["value"], ".4g")}')
  say(f'written to {workdir.show(str(pathlib.Path(workdir.folder) / "evaluation" / IMPORTED))}')
  say('Start the command of the run again to show them in its table and report.')


def import_results(run: str, files: Sequence[str], model: str) -> dict[str, dict[str, Any]]:
  """Read files, and write their metrics to `evaluation/imported.json` of a run.

  A metric that was imported before is replaced.

  Args:
    run: folder of the run.
    files: results of evaluation programs.
    model: name of the run's model that they are about.

  Returns:
    The numbers by title.

  Raises:
    UserError: if the run was not evaluated or has no such model, or a file cannot be read.
  """
  folder = pathlib.Path(run) / 'evaluation'
  if not (folder / 'summary.json').exists():
    raise UserError(f'{run} has no table. Give the folder of a run whose evaluate stage is done.')
  models = [*read_json(folder / 'summary.json').get('models', {})]
  if model not in models:
    raise UserError(f'--model is {show(model)}. The models of this run are {", ".join(models)}.')
  numbers: dict[str, dict[str, Any]] = {}
  for file in files:
    program, metrics = read_results(file)
    for metric in metrics:
      if metric.title in numbers:
        other = numbers[metric.title]['file']
        raise UserError(f'{file} and {other} both have {metric.title!r}. Give one of them.')
      numbers[metric.title] = {
        'value': metric.value,
        'interval': metric.interval and list(metric.interval),
        'count': metric.count,
        'program': program,
        'file': pathlib.Path(file).name,
      }
  imported = read_imported(folder / IMPORTED)
  imported[model] = imported.get(model, {}) | numbers
  write_json(folder / IMPORTED, imported)
  return numbers


def read_imported(path: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Return the imported numbers by model and title; none if nothing was imported.

  Args:
    path: the file `imported.json`.

  Raises:
    UserError: if it is damaged.
  """
  if not path.exists():
    return {}
  imported = read_json(path)
  check_shape(imported, _SHAPE, str(path))
  return imported


def with_imported(summary: Mapping[str, Any], path: pathlib.Path) -> dict[str, Any]:
  """Return a summary with the imported numbers as further columns of its models.

  Args:
    summary: the summary of a run.
    path: the file `imported.json` of the run.

  Raises:
    UserError: if the file is damaged.
  """
  rows = dict(summary.get('models', {}))
  for model, numbers in read_imported(path).items():
    if model in rows:
      columns = {title: number['value'] for title, number in numbers.items()}
      intervals = {f'{title}_interval': number['interval'] for title, number in numbers.items()}
      rows[model] = {**rows[model], **columns, **intervals}
  return {**summary, 'models': rows} if rows else dict(summary)


def has_new_results(run: pathlib.Path) -> bool:
  """Return whether results were imported after the report was written.

  Args:
    run: folder of the run.
  """
  imported, report = run / 'evaluation' / IMPORTED, run / 'report.html'
  return (
    imported.exists()
    and report.exists()
    and imported.stat().st_mtime_ns > report.stat().st_mtime_ns
  )
