"""Orderly interruption: SIGTERM and SIGINT end a run, and the next start continues it.

The first signal raises `Interrupted` in the main thread, at whatever point it is. That is safe
everywhere, because files are written under a temporary name and renamed, and the journal appends
whole lines. Training defers the exception until a checkpoint is saved. A second signal ends the
process at once, even during a compilation.

In a run of several processes, a signal to one of them reaches all through the key-value store of
`jax.distributed`. There, the exception is raised only in work that a process does alone; elsewhere
the others would wait for it in a collective operation. The processes agree on a common point to
stop: the next training step but one, or the end of `processes.run_on_all_processes`.

This module imports JAX late, so that it can be imported before anything else.
"""

import contextlib
import os
import pathlib
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Seconds after which a signal ends the process without an exception, if the main thread is in a
# library call such as a long compilation. No file is lost, because a kill loses none either.
GRACE_SECONDS = 4.0
RETRY_SECONDS = 0.02  # until the handler runs again, if Python ignored what it raised
POLL_SECONDS = 0.5  # between two looks for a signal to another process
_SIGNAL_KEY, _STEP_KEY = 'cai_jax/interruption/signal', 'cai_jax/interruption/step'


class Interrupted(KeyboardInterrupt):
  """A stop after SIGTERM or SIGINT. Starting the run again continues it.

  Args:
    number: number of the signal.
    detail: what was interrupted and what is kept, as sentences.
  """

  def __init__(self, number: int, detail: str = 'Finished work is kept.'):
    super().__init__(detail)
    self.number = number

  @property
  def status(self) -> int:
    """Exit status of the program: 143 after SIGTERM, 130 after SIGINT."""
    return 128 + self.number

  def describe(self) -> str:
    """Return a line for the user."""
    return f'{_name(self.number)}: {self} Start the same command again to continue.'


class _State:
  """What this process knows of signals; there is one, because handlers belong to the process.

  Attributes:
    number: number of the first signal; 0 before it.
    handled: whether the handler has run in the main thread.
    deferrals: number of active deferrals.
    local_work: number of active blocks of work that this process does alone.
    watcher: the thread that reads signals as they arrive, while there is a listener.
    client: connection to the other processes; None without them.
    hook: what `sys.unraisablehook` was before there was a listener.
  """

  def __init__(self) -> None:
    self.number = 0
    self.handled = False
    self.deferrals = 0
    self.local_work = 0
    self.watcher: threading.Thread | None = None
    self.client: Any = None
    self.hook = sys.unraisablehook

  @property
  def may_raise(self) -> bool:
    return not self.deferrals and (self.client is None or self.local_work > 0)


_state = _State()


def _guard_start() -> None:
  """Let a signal end a program of this package with a line and an exit status while it imports.

  Importing JAX takes seconds. Other programs that import this package keep their handlers.
  """
  program, arguments = pathlib.Path(sys.argv[0] if sys.argv else ''), ' '.join(sys.orig_argv)
  if (
    program.name == 'cai-jax'
    or (program.name == '-m' and ' cai_jax.' in arguments)
    or program.resolve() == pathlib.Path(__file__).parents[2] / 'launch.py'
  ):
    for number in SIGNALS:
      signal.signal(number, lambda number, _: _end_at_once(number))


@contextlib.contextmanager
def listen() -> Iterator[None]:
  """Raise `Interrupted` in the block after SIGTERM or SIGINT. Blocks may be nested.

  Python allows signal handlers in the main thread only; elsewhere the block just runs.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  if _state.watcher is not None:
    yield
    return
  handled = (*SIGNALS, signal.SIGALRM)
  previous = {number: signal.signal(number, _on_signal) for number in handled}
  previous_hook, sys.unraisablehook = sys.unraisablehook, _on_ignored_exception
  _state.hook = previous_hook
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  previous_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  _state.number, _state.handled = 0, False
  _state.watcher = threading.Thread(target=_watch, args=(reader,), daemon=True)
  _state.watcher.start()
  join_processes()
  try:
    yield
  finally:
    sys.unraisablehook = previous_hook
    signal.set_wakeup_fd(previous_fd)
    os.close(writer)  # ends the watcher
    _state.watcher, _state.client = None, None
    _state.number, _state.handled = 0, False  # later work in this process is not interrupted
    signal.setitimer(signal.ITIMER_REAL, 0)  # a late alarm would kill a process without a handler
    for number, handler in previous.items():
      signal.signal(number, handler)


def join_processes() -> None:
  """Exchange signals with the other processes of the run, if there are any, from now on."""
  from jax._src import distributed  # there is no public way to the key-value store

  client = distributed.global_state.client
  if _state.watcher is not None and _state.client is None and client is not None:
    _state.client = client
    threading.Thread(target=_hear_processes, args=(client,), daemon=True).start()


def pending() -> int:
  """Return the number of a signal that has arrived and is not deferred; 0 without one."""
  return 0 if _state.deferrals else _state.number


def check() -> None:
  """Raise `Interrupted` if a signal has arrived and is not deferred.

  Long loops call this. The handler has raised already, unless something caught the exception.
  """
  if _state.number and _state.may_raise:
    raise Interrupted(_state.number)


@contextlib.contextmanager
def local_work() -> Iterator[None]:
  """Mark work that this process does alone, without collective operations."""
  _state.local_work += 1
  try:
    check()
    yield
  finally:
    _state.local_work -= 1


class Deferral:
  """A context manager that holds back `Interrupted` from `begin` to the end of its block."""

  def __init__(self) -> None:
    self._active = False

  def __enter__(self) -> 'Deferral':
    return self

  def __exit__(self, kind: type | None, *_: object) -> None:
    if self._active:
      self._active = False
      _state.deferrals -= 1
      if kind is None:
        check()

  def begin(self) -> None:
    """Hold signals back from now on; calling it again changes nothing."""
    if not self._active:
      self._active = True
      _state.deferrals += 1

  def must_stop(self, step: int) -> int:
    """Return the signal to stop for after this step, or 0.

    Every process must call this at every step. A process that received a signal proposes the next
    step but one: the metrics of a step need all processes, so none is further than one step ahead.

    Args:
      step: number of steps taken.
    """
    if _state.client is None:
      return _state.number
    return stop_together(_STEP_KEY, step, _state.number)


def stop_together(key: str, step: int, number: int) -> int:
  """Return the number for which all processes that share a key stop after this step, or 0.

  All of them call this at every step, and none is more than one step ahead of another. One that has
  a reason to stop proposes the next step but one.

  Args:
    key: names the steps in the key-value store of the processes.
    step: number of steps taken.
    number: the reason of this process to stop, such as a signal; 0 if it has none.
  """
  from jax._src import distributed  # there is no public way to the key-value store

  client: Any = distributed.global_state.client
  if number:
    with contextlib.suppress(RuntimeError):  # another process has proposed a step
      client.key_value_set(key, f'{step + 2} {number}', allow_overwrite=False)
  agreed = _try_get(client, key)
  last, reason = map(int, agreed.split()) if agreed else (step + 1, 0)
  return reason if step >= last else 0


def _on_signal(number: int, _: FrameType | None) -> None:
  """Handle a signal, in the main thread and between two of its instructions."""
  if number in SIGNALS and _state.handled:
    return  # `_watch` ends the process at a second signal
  _state.number, _state.handled = _state.number or number, True
  check()


def _on_ignored_exception(ignored: Any) -> None:
  """Raise `Interrupted` again soon if Python ignored it; print other exceptions as before.

  Python ignores exceptions in finalizers, and in callbacks of weak references, of the garbage
  collector and of C libraries.
  """
  if isinstance(ignored.exc_value, Interrupted):
    signal.setitimer(signal.ITIMER_REAL, RETRY_SECONDS)
  else:
    _state.hook(ignored)


def _watch(reader: int) -> None:
  """Read signals as they arrive, while the main thread may be in a long library call."""
  first, since = 0, 0.0
  while True:
    readable, _, _ = select.select([reader], [], [], GRACE_SECONDS if first else None)
    if not readable:
      if not _state.handled and not _state.deferrals and _state.client is None:
        _end_at_once(first)
      continue
    numbers = os.read(reader, 64)
    if not numbers:
      os.close(reader)
      return
    for number in filter(SIGNALS.__contains__, numbers):
      # A scheduler sends its signal to all processes, and each tells the others of it.
      if first and (_state.client is None or time.monotonic() > since + GRACE_SECONDS):
        _end_at_once(number)
      first, since = first or number, since or time.monotonic()
      _tell_processes(number)


def _end_at_once(number: int) -> None:
  """End this process without cleaning up, which is as safe as a kill."""
  line = Interrupted(number, 'Ended at once; finished work is kept.').describe()
  with contextlib.suppress(OSError):  # the terminal may be gone
    os.write(2, f'{line}\n'.encode())
  os._exit(128 + number)


def _hear_processes(client: Any) -> None:
  """Send this process the signal that another process received."""
  pause = threading.Event()
  while _state.client is client and not _state.number:
    try:
      text = _try_get(client, _SIGNAL_KEY)
    except RuntimeError:  # the connection is closed
      return
    if text and not _state.number:
      _state.number = int(text)
      os.kill(os.getpid(), int(text))
    pause.wait(POLL_SECONDS)


def _tell_processes(number: int) -> None:
  if _state.client is not None:
    with contextlib.suppress(RuntimeError):  # another process has told them
      _state.client.key_value_set(_SIGNAL_KEY, str(number), allow_overwrite=False)


def _try_get(client: Any, key: str) -> str:
  """Return a value of the key-value store, or '' if the key is not set."""
  try:
    return client.key_value_try_get(key)
  except RuntimeError as error:
    if 'NOT_FOUND' in str(error):
      return ''
    raise


def _name(number: int) -> str:
  return signal.Signals(number).name


_guard_start()  # at import, because `cai_jax/__init__.py` imports this module first
