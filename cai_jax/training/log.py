"""The log of a training run: metrics, costs, held-out losses, probes and progress."""

import contextlib
import math
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax

from cai_jax.runtime import hardware
from cai_jax.runtime.errors import NonFiniteError
from cai_jax.runtime.progress import Progress
from cai_jax.training.fit_config import FitConfig
from cai_jax.training.metrics import (
  COSTS_FILE,
  HELD_OUT_FILE,
  METRICS_FILE,
  PROBES_FILE,
  MetricsWriter,
)
from cai_jax.training.workload import Workload


class TrainingLog:
  """A log that checks, writes and summarizes the metrics of a run; only process 0 writes.

  The log is a context manager. It fetches the metrics of a step from the device when the next step
  has been dispatched, so the device never waits for the host. Steps count from 1.

  Args:
    workdir: folder of the run.
    first_step: number of steps taken before this start.
    total_steps: number of steps of the whole run.
    log_every: steps between rows of metrics.jsonl and costs.jsonl.
    workload: what each step computes.
    wandb: Weights & Biases project that scalars are also sent to; '' disables it.
    settings: the run's settings, which Weights & Biases shows.
    section: section of the config that has the settings, for messages and the progress bar.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    first_step: int,
    total_steps: int,
    log_every: int,
    workload: Workload,
    wandb: str = '',
    settings: Mapping[str, Any] = MappingProxyType({}),
    section: str = 'train',
  ):
    self._first_step, self._total_steps, self._log_every = first_step, total_steps, log_every
    self._workload, self._section = workload, section
    self._pending: tuple[int, dict[str, jax.Array]] | None = None  # not fetched yet
    # The latest metrics that have been fetched and checked.
    self._last_step = first_step
    self._last_metrics: dict[str, float] = {}
    self._target_tokens = 0.0
    self._start_time = time.monotonic()
    # Step, time and target tokens at the last row of costs.jsonl.
    self._row_step, self._row_time, self._row_tokens = first_step, self._start_time, 0.0
    self._progress = Progress(section, 'step', first_step)
    self._writer: MetricsWriter | None = None
    if jax.process_index() == 0:
      self._writer = MetricsWriter(workdir, first_step, wandb, settings)

  def __enter__(self) -> 'TrainingLog':
    return self

  def __exit__(self, kind, *_) -> None:
    self._progress.close()
    if self._writer is not None:
      self._writer.close(succeeded=kind is None)

  def log_step(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """Accept the metrics of a step, and write those of the step before it.

    Args:
      step: number of steps taken.
      metrics: metrics of the last step, as `step.make_train_step` describes them.

    Raises:
      NonFiniteError: if the loss or gradient norm of the step before is NaN or infinite; the
        message names the step and its examples.
    """
    pending, self._pending = self._pending, (step, metrics)
    self._fetch(pending)

  def write_pending(self) -> None:
    """Fetch, check and write the metrics of the last step.

    Raises:
      NonFiniteError: as in `log_step`.
    """
    pending, self._pending = self._pending, None
    self._fetch(pending)

  def log_held_out(self, step: int, losses: dict[str, float]) -> None:
    """Write the losses on held-out examples.

    Args:
      step: number of steps taken.
      losses: losses by name, from `HeldOut.evaluate`.
    """
    if self._writer is not None:
      self._writer.write_scalars(HELD_OUT_FILE, 'held_out', {'step': step, **losses})

  def log_probes(self, step: int, answers: Sequence[dict[str, str]]) -> None:
    """Write the answers to probe prompts.

    Args:
      step: number of steps taken.
      answers: one dict per prompt, with `id`, `prompt` and `text`.
    """
    if self._writer is None:
      return
    for answer in answers:
      self._writer.write_row(PROBES_FILE, {'step': step, **answer})
      texts = answer['prompt'], answer['text']
      self._writer.write_texts(f'probes/{answer["id"]}', texts, step)

  @contextlib.contextmanager
  def pause_timer(self) -> Iterator[None]:
    """Exclude the time that the block takes from the time per step in costs.jsonl."""
    begin = time.monotonic()
    yield
    self._row_time += time.monotonic() - begin

  def write_last_row(self) -> None:
    """Write the rows of the last step, unless `log_every` has already written them."""
    if self._last_step == self._row_step:
      return
    costs = self._measure_costs()
    if self._writer is not None:
      step = {'step': self._last_step}
      self._writer.write_scalars(METRICS_FILE, 'train', step | self._last_metrics)
      self._writer.write_scalars(COSTS_FILE, 'costs', step | costs)

  def summarize(self) -> dict[str, float]:
    """Return time, tokens, utilization and last metrics of this start of the run."""
    seconds = time.monotonic() - self._start_time
    steps = slice(self._first_step, self._last_step)
    summary = {
      'resumed_at': self._first_step,
      'seconds': seconds,
      'target_tokens': self._target_tokens,
      'target_tokens_per_second': self._target_tokens / max(seconds, 1e-9),
      'model_tokens_per_second': float(self._workload.tokens[steps].sum()) / max(seconds, 1e-9),
      'model_flops_per_second': float(self._workload.flops[steps].sum()) / max(seconds, 1e-9),
      **{
        f'last_{name}': value
        for name, value in self._last_metrics.items()
        if name in ('loss', 'grad_norm')
      },
    }
    if self._workload.peak_flops:
      summary['utilization'] = summary['model_flops_per_second'] / self._workload.peak_flops
    return summary

  def _fetch(self, pending: tuple[int, dict[str, jax.Array]] | None) -> None:
    """Fetch the metrics of a step, check them, and write a row if one is due."""
    if pending is None:
      return
    step, metrics = pending
    row = {name: float(value) for name, value in jax.device_get(metrics).items()}
    for name in ('loss', 'grad_norm'):
      if not math.isfinite(row[name]):
        raise NonFiniteError(
          f'{name} is {row[name]} at step {step}. Lower {self._section}.learning_rate, set '
          f'{self._section}.clip_norm, or check the examples of that step: '
          f'{_list(self._workload.example_ids(step - 1))}. Earlier checkpoints are kept.'
        )
    self._target_tokens += row['num_tokens']
    self._last_step, self._last_metrics = step, row
    if step % self._log_every == 0 or step == self._total_steps:
      self.write_last_row()
    text = f'loss {row["loss"]:.4g}'
    self._progress(step, self._total_steps, int(self._target_tokens), text)

  def _measure_costs(self) -> dict[str, float]:
    """Return the costs of the steps since the last row; the first step includes compilation."""
    now = time.monotonic()
    seconds = max(now - self._row_time, 1e-9)
    steps = slice(self._row_step, self._last_step)
    costs = {
      'seconds_per_step': seconds / (self._last_step - self._row_step),
      'tokens_per_second': float(self._workload.tokens[steps].sum()) / seconds,
      'target_tokens_per_second': (self._target_tokens - self._row_tokens) / seconds,
      'model_flops_per_second': float(self._workload.flops[steps].sum()) / seconds,
      'memory_bytes': hardware.memory_bytes(jax.local_devices()[0]),
    }
    if self._workload.peak_flops:
      costs['utilization'] = costs['model_flops_per_second'] / self._workload.peak_flops
    self._row_step, self._row_time, self._row_tokens = self._last_step, now, self._target_tokens
    return costs


def remarks(summary: Mapping[str, Any], config: FitConfig) -> list[str]:
  """Return sentences about a training that the log, the manifest and the report show.

  Args:
    summary: the summary of the training, from `loop.fit`.
    config: settings of the run.
  """
  sentences = []
  if config.patience and 'held_out_loss' in summary:
    sentences.append(
      f'The exported model is that of step {summary["exported_step"]}, which has the lowest '
      f'held-out loss: {summary["least_held_out_loss"]:.4g}. Training ended at step '
      f'{summary["steps_taken"]} of {summary["steps"]} with {summary["held_out_loss"]:.4g}.'
    )
  if summary['clipped_share'] > 0.5:
    sentences.append(
      f'Warning: the gradient was clipped in {100 * summary["clipped_share"]:.0f} % of the steps, '
      f'so {config.section}.clip_norm={config.clip_norm:g} sets the size of most updates. Raise '
      f'it, lower {config.section}.learning_rate, or set {config.section}.clip_norm=0.'
    )
  return sentences


def _list(names: Sequence[str], limit: int = 20) -> str:
  more = f' and {len(names) - limit} more' if len(names) > limit else ''
  return ', '.join(names[:limit]) + more
