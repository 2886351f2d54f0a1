"""The progress of a long loop: a bar on a terminal, and occasional plain lines elsewhere."""

import sys
import time

import jax
import tqdm

from cai_jax.runtime.terminal import printable, say

LINE_SECONDS = 15.0  # between plain lines


class Progress:
  """A callable that shows the units done, tokens per second and remaining time.

  Only process 0 shows anything.

  Args:
    name: name of the loop.
    unit: name of the counted unit, in the singular.
    start: number of units that were done before this process started.
    quiet_seconds: seconds before anything is shown, for a loop that is usually short.
  """

  def __init__(self, name: str, unit: str = 'row', start: int = 0, quiet_seconds: float = 0.0):
    self._quiet = quiet_seconds
    self._name, self._unit, self._start = name, unit, start
    self._bar: tqdm.tqdm | None = None
    self._started = self._last_line = time.monotonic()
    self._logs = jax.process_index() == 0

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def close(self) -> None:
    """Close the progress bar and leave it on the screen."""
    if self._bar is not None:
      self._bar.close()

  def __call__(self, done: int, total: int, tokens: int, text: str = '') -> None:
    """Show the state of the loop.

    Args:
      done: number of units done so far, including those before the start.
      total: total number of units.
      tokens: number of tokens processed since the start of this process.
      text: shown before the speed, such as the current loss.
    """
    now = time.monotonic()
    seconds = now - self._started
    if not self._logs or seconds < self._quiet:
      return
    status = f'{text}, ' * bool(text) + f'{tokens / max(seconds, 1e-9):,.0f} tokens/s'
    if sys.stderr.isatty():
      if self._bar is None:
        self._bar = tqdm.tqdm(
          total=total, initial=self._start, desc=printable(self._name), unit=self._unit
        )
      self._bar.set_postfix_str(printable(status), refresh=False)
      self._bar.update(done - self._bar.n)
    elif done == total or now - self._last_line > LINE_SECONDS:
      self._last_line = now
      if done - self._start > 0.05 * (total - self._start):  # the first units predict little
        left = seconds * (total - done) / (done - self._start)
        status += f', {left:.0f} s left'
      say(f'{self._name}: {done} of {total} {self._unit}s, {status}')
