"""How far a long loop is: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time

import jax
import tqdm

LINE_SECONDS = 15.0  # between plain lines


class Progress:
  """A callable `progress(done, total, tokens)` that shows rows, tokens per second and time left."""

  def __init__(self, name: str):
    self._name = name
    self._bar = None
    self._began = self._said = time.monotonic()
    self._speaks = jax.process_index() == 0

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *_) -> None:
    if self._bar is not None:
      self._bar.close()

  def __call__(self, done: int, total: int, tokens: int) -> None:
    """Shows that `done` of `total` rows are there and `tokens` have been sampled for them."""
    if not self._speaks:
      return
    now = time.monotonic()
    seconds = now - self._began
    speed = f'{tokens / max(seconds, 1e-9):,.0f} tokens/s'
    if sys.stderr.isatty():
      if self._bar is None:
        self._bar = tqdm.tqdm(total=total, desc=self._name, unit='row')
      self._bar.set_postfix_str(speed, refresh=False)
      self._bar.update(done - self._bar.n)
    elif done == total or now - self._said > LINE_SECONDS:
      self._said = now
      left = seconds * (total - done) / done
      print(f'{self._name}: {done} of {total} rows, {speed}, {left:.0f} s left', flush=True)
