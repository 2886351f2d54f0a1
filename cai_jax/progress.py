"""How far a long loop is: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time

import jax
import tqdm

LINE_SECONDS = 15.0  # between plain lines


class Progress:
  """A callable `progress(done, total, stats)` that shows rows done, tokens/s and the time left."""

  def __init__(self, name: str):
    self._name = name
    self._bar = None
    self._said = time.monotonic()
    self._speaks = jax.process_index() == 0

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *_) -> None:
    if self._bar is not None:
      self._bar.close()

  def __call__(self, done: int, total: int, stats) -> None:
    if not self._speaks:
      return
    speed = stats.sampled_tokens / max(stats.seconds, 1e-9)
    if sys.stderr.isatty():
      if self._bar is None:
        self._bar = tqdm.tqdm(total=total, desc=self._name, unit='row')
      self._bar.update(done - self._bar.n)
      self._bar.set_postfix_str(f'{speed:,.0f} tokens/s', refresh=False)
    elif done == total or time.monotonic() - self._said > LINE_SECONDS:
      self._said = time.monotonic()
      left = stats.seconds * (total - done) / done
      print(
        f'{self._name}: {done} of {total} rows, {speed:,.0f} tokens/s, {left:.0f} s left',
        flush=True,
      )
