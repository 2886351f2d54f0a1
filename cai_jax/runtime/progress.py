"""How far a long loop is: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time

import jax
import tqdm

LINE_SECONDS = 15.0  # between plain lines


class Progress:
  """A callable `progress(done, total, tokens)` that shows units, tokens per second and time left.

  Args:
    name: of the loop.
    unit: what `done` counts.
    start: how many were done before this process began.
  """

  def __init__(self, name: str, unit: str = 'row', start: int = 0):
    self._name, self._unit, self._start = name, unit, start
    self._bar = None
    self._began = self._said = time.monotonic()
    self._speaks = jax.process_index() == 0

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def close(self) -> None:
    """Leaves the bar as it stands."""
    if self._bar is not None:
      self._bar.close()

  def __call__(self, done: int, total: int, tokens: int, text: str = '') -> None:
    """Shows that `done` of `total` are there, which took `tokens` since the start, and a text."""
    if not self._speaks:
      return
    now = time.monotonic()
    seconds = now - self._began
    told = f'{text}, ' * bool(text) + f'{tokens / max(seconds, 1e-9):,.0f} tokens/s'
    if sys.stderr.isatty():
      if self._bar is None:
        self._bar = tqdm.tqdm(total=total, initial=self._start, desc=self._name, unit=self._unit)
      self._bar.set_postfix_str(told, refresh=False)
      self._bar.update(done - self._bar.n)
    elif done == total or now - self._said > LINE_SECONDS:
      self._said = now
      if done - self._start > 0.05 * (total - self._start):  # the first to end say little
        left = seconds * (total - done) / (done - self._start)
        told += f', {left:.0f} s left'
      print(f'{self._name}: {done} of {total} {self._unit}s, {told}', flush=True)
