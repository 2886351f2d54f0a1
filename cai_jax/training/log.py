"""What a training run tells: metrics, costs, held-out losses, probes.

It goes to files and TensorBoard, and to Weights & Biases where that is asked for.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import tensorboardX

from cai_jax.runtime import hardware
from cai_jax.runtime.errors import NonFiniteError
from cai_jax.runtime.progress import Progress

WANDB_ID = 'wandb_id'  # file with the id of the run at Weights & Biases
METRICS, COSTS, HELD_OUT, PROBES = 'metrics.jsonl', 'costs.jsonl', 'held_out.jsonl', 'probes.jsonl'


@dataclasses.dataclass(frozen=True)
class Work:
  """What each step computes, known before the first.

  Attributes:
    tokens: i64[steps], of prompts and replies; padding is none.
    flops: f64[steps], that the model needs for them, forward and backward; nothing that is computed
      twice counts twice.
    peak: FLOP/s of all devices together; None where it is not known.
    ids: step → names of the examples in it.
  """

  tokens: np.ndarray
  flops: np.ndarray
  peak: float | None
  ids: Callable[[int], list[str]]


class Log:
  """Rows of a run's files, TensorBoard events, and progress; process 0 writes.

  Numbers are fetched a step late, so that the device never waits for the host. On a resumed run
  the rows after its first step are cut away: no step stands there twice.

  Args:
    workdir: of the run.
    first: steps done before.
    total: steps in all.
    every: steps between rows of metrics.jsonl and costs.jsonl.
    work: what the steps compute.
    wandb: project of Weights & Biases that gets the scalars too, as one run however often it is
      resumed; '' is none.
    settings: of the run, which are shown there.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    first: int,
    total: int,
    every: int,
    work: Work,
    wandb: str = '',
    settings: Mapping[str, Any] = MappingProxyType({}),
  ):
    self._first, self._total, self._every, self._work = first, total, every, work
    self._waiting = None
    self._last, self._done = {}, first
    self._unwritten = None  # step and metrics of the last step, where it has no row yet
    self._tokens = 0.0  # targets
    self._began = time.monotonic()
    self._since = first, self._began, 0.0  # step, time and target tokens of the last row of costs
    self._speaks = jax.process_index() == 0
    if not self._speaks:
      return
    self._files = {}
    for name in (METRICS, COSTS, HELD_OUT, PROBES):
      _cut(workdir / name, first)
      self._files[name] = workdir / name
    # Events at and after the purge step are hidden; step `first`, counted from 1, is done.
    self._events = tensorboardX.SummaryWriter(str(workdir / 'tensorboard'), purge_step=first + 1)
    self._wandb = _wandb_run(workdir, wandb, settings) if wandb else None
    self._progress = Progress('train', 'step', first)

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    if self._speaks:
      self._events.close()
      self._progress.close()
      if self._wandb is not None:
        self._wandb.finish(exit_code=0 if kind is None else 1)

  def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """Takes the metrics of step 0, 1, ..., and writes those of the step before.

    Raises:
      FloatingPointError: if these are not finite, naming the step and its examples.
    """
    waiting, self._waiting = self._waiting, (step, metrics)
    self._write(waiting)

  def flush(self) -> None:
    """Writes what is waiting.

    Raises:
      FloatingPointError: as `add`.
    """
    waiting, self._waiting = self._waiting, None
    self._write(waiting)

  def held_out(self, done: int, row: dict[str, float]) -> None:
    """Writes what was found on held-out examples after `done` steps."""
    if self._speaks:
      self._append(HELD_OUT, {'step': done, **row}, 'held_out')

  def probes(self, done: int, answers: Sequence[dict[str, str]]) -> None:
    """Writes the answers (id, prompt, text) to probe prompts after `done` steps."""
    if not self._speaks:
      return
    for answer in answers:
      self._append(PROBES, {'step': done, **answer})
      text = f'**{answer["prompt"]}**\n\n{answer["text"]}'
      self._events.add_text(f'probes/{answer["id"]}', text, done)

  def summary(self) -> dict[str, float]:
    """Seconds, tokens, use of the devices and last metrics of what this process did of the run."""
    seconds = time.monotonic() - self._began
    done = slice(self._first, self._done)
    found = {
      'resumed_at': self._first,
      'seconds': seconds,
      'target_tokens': self._tokens,
      'target_tokens_per_second': self._tokens / max(seconds, 1e-9),
      'model_tokens_per_second': float(self._work.tokens[done].sum()) / max(seconds, 1e-9),
      'model_flops_per_second': float(self._work.flops[done].sum()) / max(seconds, 1e-9),
      **{f'last_{k}': v for k, v in self._last.items() if k in ('loss', 'grad_norm')},
    }
    if self._work.peak:
      found['utilization'] = found['model_flops_per_second'] / self._work.peak
    return found

  def _write(self, waiting) -> None:
    if waiting is None:
      return
    step, metrics = waiting
    row = {name: float(value) for name, value in jax.device_get(metrics).items()}
    for name in ('loss', 'grad_norm'):
      if not math.isfinite(row[name]):
        raise NonFiniteError(
          f'{name} is {row[name]} at step {step + 1}: lower train.learning_rate, set '
          f'train.clip_norm, or look at the examples of that step: {_some(self._work.ids(step))}. '
          'The checkpoints before it are kept.'
        )
    self._tokens += row['num_tokens']
    self._last, self._done, self._unwritten = row, step + 1, (step, row)
    if (step + 1) % self._every == 0 or step + 1 == self._total:
      self.finish()
    if self._speaks:
      self._progress(step + 1, self._total, int(self._tokens), f'loss {row["loss"]:.4g}')

  @contextlib.contextmanager
  def elsewhere(self) -> Iterator[None]:
    """What is done in the block does not count as time of steps."""
    begin = time.monotonic()
    yield
    first, then, tokens = self._since
    self._since = first, then + time.monotonic() - begin, tokens

  def finish(self) -> None:
    """Writes the rows of the last step, if it has none yet."""
    if self._unwritten is None:
      return
    (step, row), self._unwritten = self._unwritten, None
    costs = self._costs(step + 1)
    if self._speaks:
      self._append(METRICS, {'step': step + 1, **row}, 'train')
      self._append(COSTS, {'step': step + 1, **costs}, 'costs')

  def _costs(self, done: int) -> dict[str, float]:
    """What the steps since the last row took; the first of a process compiles."""
    (first, then, tokens), now = self._since, time.monotonic()
    self._since = done, now, self._tokens
    seconds, steps = max(now - then, 1e-9), slice(first, done)
    costs = {
      'seconds_per_step': seconds / (done - first),
      'tokens_per_second': float(self._work.tokens[steps].sum()) / seconds,
      'target_tokens_per_second': (self._tokens - tokens) / seconds,
      'model_flops_per_second': float(self._work.flops[steps].sum()) / seconds,
      'memory_bytes': hardware.memory_bytes(jax.local_devices()[0]),
    }
    if self._work.peak:
      costs['utilization'] = costs['model_flops_per_second'] / self._work.peak
    return costs

  def _append(self, name: str, row: dict[str, Any], group: str = '') -> None:
    with open(self._files[name], 'a', encoding='utf-8') as file:
      file.write(json.dumps(row) + '\n')
    if not group:
      return
    scalars = {f'{group}/{key}': value for key, value in row.items() if key != 'step'}
    for key, value in scalars.items():
      self._events.add_scalar(key, value, row['step'])
    if self._wandb is not None:
      self._wandb.log({'step': row['step'], **scalars})


def read(path: pathlib.Path, last: int | None = None) -> list[dict[str, Any]]:
  """Whole rows of one of the files, up to those of step `last`; [] where there is no file."""
  if not path.exists():
    return []
  rows = [json.loads(line) for line in path.read_bytes().split(b'\n')[:-1]]
  return [row for row in rows if last is None or row['step'] <= last]


def _wandb_run(workdir: pathlib.Path, project: str, settings: Mapping[str, Any]):
  """The run at Weights & Biases of a workdir, new or gone on with."""
  import wandb  # an extra, which TrainConfig has looked for

  # Kept in the workdir: it moves with it, and another run in a folder of that name is another.
  path = workdir / WANDB_ID
  if not path.exists():
    scratch = path.with_suffix('.tmp')
    scratch.write_text(secrets.token_hex(8))
    os.replace(scratch, path)
  run = wandb.init(
    project=project,
    id=path.read_text(),
    resume='allow',
    dir=str(workdir),
    config=dict(settings),
  )
  # Its own counter never goes back, as ours does from a crash to the last checkpoint.
  run.define_metric('step')
  run.define_metric('*', step_metric='step')
  return run


def _cut(path: pathlib.Path, first: int) -> None:
  """Keeps the whole rows of a file up to step `first`."""
  if path.exists():
    scratch = path.with_suffix('.tmp')
    scratch.write_text(''.join(json.dumps(row) + '\n' for row in read(path, first)))
    os.replace(scratch, path)


def _some(names: list[str], most: int = 20) -> str:
  more = f' and {len(names) - most} more' if len(names) > most else ''
  return ', '.join(names[:most]) + more
