"""Orderly interruption: on SIGTERM, a run saves a checkpoint and ends."""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):
  """A stop after SIGTERM, with a checkpoint saved. Starting the run again resumes it."""


class SigtermListener:
  """A context manager that detects SIGTERM, with the same result in all processes.

  In a run of several processes, JAX's preemption service handles the signal and agrees on a step
  that no process has passed.
  """

  def __init__(self):
    self._received = False
    self._previous_handler = None

  def __enter__(self) -> 'SigtermListener':
    # Python allows signal handlers in the main thread only.
    is_main_thread = threading.current_thread() is threading.main_thread()
    if jax.process_count() == 1 and is_main_thread:
      self._previous_handler = signal.signal(signal.SIGTERM, self._on_signal)
    return self

  def __exit__(self, *_) -> None:
    if self._previous_handler is not None:
      signal.signal(signal.SIGTERM, self._previous_handler)

  def must_stop(self, step: int) -> bool:
    """Return whether to stop after this step; every process must call this at every step.

    Args:
      step: number of steps taken.
    """
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._received

  def _on_signal(self, *_) -> None:
    self._received = True
