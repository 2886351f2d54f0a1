"""The measured times of one model's programs, and what is chosen by them."""

import time
from collections.abc import Sequence

import numpy as np

from cai_jax.sampling.config import AUTO
from cai_jax.sampling.draft_choice import DraftChoice
from cai_jax.sampling.programs import Programs, Size
from cai_jax.sampling.running import Running
from cai_jax.sampling.stats import Stats
from cai_jax.sampling.step_arrays import Burst


def make_drafts(
  setting: int | str, row_sizes: Sequence[int], least: int, measured: bool
) -> DraftChoice | int:
  """Return what chooses the number of drafts of a model, or the number that is always used.

  Args:
    setting: `engine.draft_tokens`.
    row_sizes: numbers of rows of a step, in ascending order.
    least: number of rows of a step from which on a row's bits do not depend on the number.
    measured: whether measured times may choose; if they may not, 'auto' is 0.
  """
  if setting != AUTO:
    return int(setting)
  return DraftChoice(next(n for n in row_sizes if n >= least)) if measured else 0


class Timing:
  """Counts the seconds and steps of one model, and tells those who choose by them.

  Args:
    programs: the sizes of programs, which are chosen by their times.
    stats: counters of the engine, which this object adds to.
    groups: number of batch shards.
    is_split: whether other processes have to choose as this one does. They measure other times, so
      no time is recorded then, and the general programs run all steps.
    drafts: what chooses the number of drafts, or the number that is always used.

  Attributes:
    step_seconds: seconds per decode step, measured on the last burst.
  """

  def __init__(
    self, programs: Programs, stats: Stats, groups: int, is_split: bool, drafts: DraftChoice | int
  ):
    self._programs, self._stats, self._groups = programs, stats, groups
    self._is_split, self._drafts = is_split, drafts
    self.step_seconds = 0.0

  def count_drafts(self, active: np.ndarray) -> int:
    """Return how many tokens each row drafts in a step of the next burst.

    Args:
      active: bool[S], the slots that decode.
    """
    if isinstance(self._drafts, int):
      return self._drafts
    return self._drafts.next(int(active.reshape(self._groups, -1).sum(1).max()))

  def count_seconds(self, size: Size, begin: float) -> None:
    """Add the time since `begin` to that of programs which prefill, or of those which do not."""
    seconds = time.perf_counter() - begin
    if size.tokens:
      self._stats.prefill_seconds += seconds
    else:
      self._stats.decode_seconds += seconds

  def record_program(self, size: Size, seconds: float, compiled: bool) -> None:
    """Take note of the time of a program; see `Programs.record`."""
    if not self._is_split:
      self._programs.record(size, seconds, compiled)

  def record(self, running: Running, burst: Burst, begin: float) -> None:
    """Take note of a burst that has ended.

    Args:
      running: the burst as it was dispatched.
      burst: its result on the host.
      begin: `time.perf_counter()` when the wait for it began.
    """
    seconds, stats, steps = time.perf_counter() - begin, self._stats, int(burst.steps)
    self.count_seconds(running.size, begin)
    self.step_seconds = seconds / max(steps, 1)
    if not running.compiled:
      elapsed = time.perf_counter() - running.begin
      self.record_program(running.size, elapsed / max(steps, 1), compiled=False)
    self._record_drafts(running, burst)
    occupied = int(burst.row_steps.sum())
    stats.decode_steps += steps
    stats.occupied += occupied
    if running.size.drafts:
      stats.draft_steps += occupied
      stats.draft_tokens += int(burst.num_sampled.sum())
    stats.slot_steps += steps * len(running.rows)

  def _record_drafts(self, running: Running, burst: Burst) -> None:
    """Take note of a burst that could have drafted."""
    if isinstance(self._drafts, int) or running.size.tokens:
      return
    active = int((running.rows >= 0).reshape(self._groups, -1).sum(1).max())
    seconds = time.perf_counter() - running.begin
    tokens = burst.num_sampled.sum() / max(burst.row_steps.sum(), 1) * burst.steps
    drafts, compiled = running.size.drafts, running.compiled
    self._drafts.record(active, drafts, seconds, float(tokens), compiled)
