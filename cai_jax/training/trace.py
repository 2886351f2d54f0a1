"""A profiler trace of a few training steps."""

import pathlib

import jax

from cai_jax.training.state import TrainState


class StepTrace:
  """A context manager that records a profiler trace of consecutive steps.

  Args:
    folder: where the trace is written.
    begin: number of steps taken before the first one to trace.
    count: number of steps to trace; 0 records nothing.
  """

  def __init__(self, folder: pathlib.Path, begin: int, count: int):
    self._folder, self._begin, self._end = folder, begin, begin + count
    self._is_recording = False

  def __enter__(self) -> 'StepTrace':
    return self

  def __exit__(self, *_) -> None:
    self._stop()

  def before_step(self, step: int, state: TrainState) -> None:
    """Start or stop recording if it is due, after the device has finished the previous steps.

    Args:
      step: number of steps taken.
      state: the state after them.
    """
    if self._is_recording and step >= self._end:
      jax.block_until_ready(state)
      self._stop()
    elif self._begin <= step < self._end and not self._is_recording:
      jax.block_until_ready(state)
      jax.profiler.start_trace(str(self._folder))
      self._is_recording = True

  def _stop(self) -> None:
    if self._is_recording:
      jax.profiler.stop_trace()
      self._is_recording = False
