"""Signals raise an exception where it is safe, and later where it is not."""

import ctypes
import gc
import os
import signal
import subprocess
import sys
import time
import weakref

import pytest

from cai_jax.runtime import interruption
from cai_jax.runtime.interruption import Deferral, Interrupted


def wait():
  """Give a signal time to arrive."""
  for _ in range(100):
    time.sleep(0.01)


@pytest.mark.parametrize('number', interruption.SIGNALS)
def test_a_signal_raises_in_the_block_and_handlers_come_back(number):
  before = signal.getsignal(number)
  with pytest.raises(Interrupted) as raised, interruption.listen():
    os.kill(os.getpid(), number)
    wait()
  assert raised.value.status == 128 + number and signal.getsignal(number) is before
  assert str(signal.Signals(number).name) in raised.value.describe()
  interruption.check()  # the signal belongs to the block, not to later work


def test_a_deferral_holds_a_signal_until_its_end():
  reached = []
  with pytest.raises(Interrupted), interruption.listen():
    with Deferral() as deferral:
      deferral.begin()
      os.kill(os.getpid(), signal.SIGTERM)
      wait()
      reached.append(deferral.must_stop(1))
    reached.append('after')
  assert reached == [signal.SIGTERM]


def test_a_deferral_that_has_not_begun_holds_nothing():
  with pytest.raises(Interrupted), interruption.listen(), Deferral():
    os.kill(os.getpid(), signal.SIGTERM)
    wait()


def test_an_alarm_does_not_outlive_the_block():
  with interruption.listen():
    signal.setitimer(signal.ITIMER_REAL, 10)
  assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_second_signal_ends_a_process_whose_terminal_is_gone():
  code = 'from cai_jax.runtime import interruption; import os; os.close(2); '
  code += 'interruption._end_at_once(15)'
  assert subprocess.run([sys.executable, '-c', code], check=False).returncode == 143


@pytest.mark.parametrize('kind', ['collector', 'weak reference', 'finalizer', 'foreign function'])
def test_a_signal_in_a_callback_that_ignores_exceptions_raises_after_it(kind, capfd):
  """Python ignores what such callbacks raise. JAX has some of the first two kinds."""
  sent = []

  def callback(*_):
    if not sent:
      sent.append(signal.SIGTERM)
      os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)
    return 0

  class Owner:
    pass

  class Finalized:
    __del__ = callback

  with pytest.raises(Interrupted), interruption.listen():
    match kind:
      case 'collector':
        gc.callbacks.append(callback)
        try:
          gc.collect()
        finally:
          gc.callbacks.remove(callback)
      case 'weak reference':
        owner = Owner()
        reference = weakref.ref(owner, callback)
        del owner
        assert reference() is None
      case 'finalizer':
        Finalized()
      case _:
        ctypes.CFUNCTYPE(ctypes.c_int)(callback)()
    assert sent
    wait()
  assert 'ignored' not in capfd.readouterr().err


def test_other_ignored_exceptions_are_still_printed(monkeypatch):
  class Finalized:
    def __del__(self):
      raise ValueError('a fault')

  seen = []
  monkeypatch.setattr(sys, 'unraisablehook', lambda ignored: seen.append(str(ignored.exc_value)))
  hook = sys.unraisablehook
  with interruption.listen():
    Finalized()
  assert seen == ['a fault'] and sys.unraisablehook is hook
