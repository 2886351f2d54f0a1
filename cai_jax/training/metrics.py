"""Metrics of a training run, in files of rows, in TensorBoard and in Weights & Biases."""

import json
import pathlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import replacing, writing
from cai_jax.runtime.shapes import Shape, check_shape
from cai_jax.training.tensorboard import EventWriter

METRICS_FILE = 'metrics.jsonl'
COSTS_FILE = 'costs.jsonl'
HELD_OUT_FILE = 'held_out.jsonl'
PROBES_FILE = 'probes.jsonl'
WANDB_ID_FILE = 'wandb_id'  # id of the run at Weights & Biases


class MetricsWriter:
  """A writer of metrics to the run's files, to TensorBoard and to Weights & Biases.

  The constructor removes the rows and TensorBoard events after `first_step`, so that a resumed run
  has no step twice. Only process 0 may have a writer.

  Args:
    workdir: folder of the run.
    first_step: number of steps taken before this start.
    wandb: Weights & Biases project; '' disables it. There, all starts of a run belong to one run.
    settings: the run's settings, which Weights & Biases shows.
  """

  def __init__(
    self, workdir: pathlib.Path, first_step: int, wandb: str, settings: Mapping[str, Any]
  ):
    self._workdir = workdir
    for name in (METRICS_FILE, COSTS_FILE, HELD_OUT_FILE, PROBES_FILE):
      _truncate(workdir / name, first_step)
    # TensorBoard hides events at and after the purge step. Steps count from 1.
    self._events = EventWriter(workdir / 'tensorboard', purge_step=first_step + 1)
    self._wandb_run = _start_wandb_run(workdir, wandb, settings) if wandb else None

  def close(self, succeeded: bool) -> None:
    """Close the files.

    Args:
      succeeded: the outcome of the run, which Weights & Biases shows.
    """
    self._events.close()
    if self._wandb_run is not None:
      self._wandb_run.finish(exit_code=0 if succeeded else 1)

  def write_row(self, file: str, row: dict[str, Any]) -> None:
    """Append a row to one of the run's files.

    Args:
      file: name of the file.
      row: JSON values by name; `step` is one of them.
    """
    path = self._workdir / file
    with writing(path), open(path, 'a', encoding='utf-8') as lines:
      lines.write(json.dumps(row) + '\n')

  def write_scalars(self, file: str, group: str, row: dict[str, float]) -> None:
    """Append a row of numbers to a file, and log them as scalars.

    Args:
      file: name of the file.
      group: the scalars are named `group/key`.
      row: numbers by key; `step` is one of them.
    """
    self.write_row(file, row)
    scalars = {f'{group}/{key}': value for key, value in row.items() if key != 'step'}
    for key, value in scalars.items():
      self._events.add_scalar(key, value, int(row['step']))
    if self._wandb_run is not None:
      self._wandb_run.log({'step': row['step'], **scalars})

  def write_texts(self, name: str, texts: Sequence[str], step: int) -> None:
    """Write plain texts to TensorBoard, which shows Markdown, as blocks of code.

    In a block of code, a text can neither format anything nor load a picture.

    Args:
      name: name of the texts.
      texts: plain texts of models and prompts.
      step: number of steps taken.
    """
    blocks = ['\n'.join(f'    {line}' for line in text.splitlines()) for text in texts]
    self._events.add_text(name, '\n\n---\n\n'.join(blocks), step)


# What the report and a resumed run read from each file; other values are numbers.
_NUMBERS = {'step': int, ...: float}
_SHAPES = {
  METRICS_FILE: _NUMBERS,
  COSTS_FILE: _NUMBERS,
  HELD_OUT_FILE: _NUMBERS | {'loss': float},
  PROBES_FILE: {'step': int, 'id': str, 'prompt': str, 'text': str},
}


def read_rows(path: pathlib.Path, last_step: int | None = None) -> list[dict[str, Any]]:
  """Return the complete rows of a file.

  Args:
    path: one of the run's files; a missing file has no rows.
    last_step: leave out the rows of later steps.

  Raises:
    UserError: if a line is damaged or has values of other types; the message names the line.
  """
  if not path.exists():
    return []
  lines = path.read_bytes().split(b'\n')[:-1]
  shape = _SHAPES.get(path.name, {'step': int})
  rows = [_parse_row(line, f'{path}, line {n}', shape) for n, line in enumerate(lines, 1)]
  return [row for row in rows if last_step is None or row['step'] <= last_step]


def _parse_row(line: bytes, place: str, shape: Shape) -> dict[str, Any]:
  try:
    row = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise UserError(f'{place} is not valid JSON: {error}. Delete the line.') from error
  if not isinstance(row, dict) or not isinstance(row.get('step'), int):
    raise UserError(f'{place} is not an object with a step. Delete the line.')
  check_shape(row, shape, place)
  return row


def _truncate(path: pathlib.Path, last_step: int) -> None:
  """Remove an incomplete row and the rows after `last_step`."""
  if path.exists():
    rows = read_rows(path, last_step)
    with replacing(path) as temporary:
      temporary.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def _start_wandb_run(workdir: pathlib.Path, project: str, settings: Mapping[str, Any]) -> Any:
  """Start this run at Weights & Biases, or resume it there."""
  import wandb  # optional; TrainConfig checks that it is installed

  # The id is stored in the workdir, so it moves with the run, and a new run in a folder of the same
  # name is a new run there.
  path = workdir / WANDB_ID_FILE
  if not path.exists():
    with replacing(path) as temporary:
      temporary.write_text(secrets.token_hex(8))
  run = wandb.init(
    project=project,
    id=path.read_text(),
    resume='allow',
    dir=str(workdir),
    config=dict(settings),
  )
  # The counter of wandb cannot go back, as ours does when a crashed run resumes from a checkpoint.
  run.define_metric('step')
  run.define_metric('*', step_metric='step')
  return run
