"""Pushes a mirror while a run works, and waits for a store that is away for a time."""

import contextlib
import errno
import os
import pathlib
import sys
import threading
import time
from collections.abc import Sequence

from cai_jax.runtime.cloud.mirror import Mirror
from cai_jax.runtime.cloud.store import explain
from cai_jax.runtime.errors import StoppedError, UserError
from cai_jax.runtime.files import describe_fault
from cai_jax.runtime.terminal import say

PERIOD_SECONDS = 5.0  # from the start of one push to the start of the next, if it is shorter
LONGEST_WAIT_SECONDS = 60.0  # between two attempts while the store is away
LAST_WAITS_SECONDS = (1.0, 2.0, 4.0, 8.0)  # between attempts at the end of a run
EXCHANGE_WAITS_SECONDS = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # while other processes wait for files

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # of a local disk; such errors name no file


class Keeper:
  """A thread that pushes a mirror every few seconds.

  If the store is away, the run goes on in the local folder, and says so once. With several
  processes, it goes on until they need the files of each other.

  Args:
    mirror: the mirror, after its first pull.
    url: URL of the store, for messages.
    alone: whether the run has one process.
  """

  def __init__(self, mirror: Mirror, url: str, alone: bool = True):
    self._mirror, self._url, self._alone = mirror, url, alone
    self._failures = 0
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def finish_stage(self) -> None:
    """Push everything and join parts, now that no file changes.

    Raises:
      StoppedError: if the local folder is gone. A store that is away is no error here.
    """
    # A part of another process is not joined here, because that may just be adding the next one.
    self._try(still=True, join=self._alone)

  def send(self) -> bool:
    """Push everything, and return whether anything was pushed since the last call.

    Raises:
      StoppedError: if the store is away for a minute, or the local folder is gone.
    """
    error = self._try_again(EXCHANGE_WAITS_SECONDS, join=False)
    if error is not None:
      raise StoppedError(
        f'{self._explain(error)} The other processes need the files of this one. Then start the '
        'same command again to continue. The work of the last seconds is done again.'
      ) from error
    return self._mirror.take_pushed()

  def receive(self) -> None:
    """Fetch what other processes have pushed.

    Raises:
      StoppedError: if the store is away for a minute.
      UserError: if what it has cannot be used.
    """
    for wait in (*EXCHANGE_WAITS_SECONDS, None):
      try:
        self._mirror.refresh()
        return
      except UserError:
        raise
      except Exception as error:  # every library has its own exceptions
        text = self._explain(error)
        if wait is None:
          raise StoppedError(f'{text} Then start the same command again to continue.') from error
        if wait == EXCHANGE_WAITS_SECONDS[0]:
          say(f'{text} The run waits, and tries again.', file=sys.stderr)
        time.sleep(wait)

  def close(self, join: bool, in_time: bool = True) -> None:
    """End the thread, and push what is left.

    Args:
      join: whether parts are joined; nobody may write to the store meanwhile.
      in_time: whether the run ended as it should. Otherwise time may be short.

    Raises:
      StoppedError: if the store is still away after some attempts.
    """
    self._ended.set()
    self._thread.join()
    waits = LAST_WAITS_SECONDS if in_time else LAST_WAITS_SECONDS[:1]
    error = self._try_again(waits, join)
    if error is not None and self._alone:
      raise StoppedError(
        f'The results of this run could not be written to {self._url}, but they are in '
        f'{self._mirror.folder}. {self._explain(error)} Then start the same command again on '
        'this machine.'
      ) from error
    if error is not None:
      raise StoppedError(
        f'The last results of this process could not be written to {self._url}. '
        f'{self._explain(error)} Then start the same command again to continue.'
      ) from error

  def _try_again(self, waits: Sequence[float], join: bool) -> Exception | None:
    """Push while no file changes, again after each wait; return the error of the last attempt."""
    error = self._try(still=True, join=join)
    for wait in waits:
      if error is None:
        return None
      time.sleep(wait)
      error = self._try(still=True, join=join)
    return error

  def _run(self) -> None:
    wait = PERIOD_SECONDS
    while not self._ended.wait(wait):
      start = time.monotonic()
      try:
        self._try()
      except StoppedError as error:
        return say(f'error: {error}', file=sys.stderr)
      wait = min(PERIOD_SECONDS * 2**self._failures, LONGEST_WAIT_SECONDS)
      wait = max(wait - (time.monotonic() - start), 0.0)

  def _try(self, still: bool = False, join: bool = False) -> Exception | None:
    """Push once, and return the error if the store is away, or the local disk cannot be used."""
    try:
      self._mirror.push(still, join)
    except UserError:
      raise
    except Exception as error:  # every library has its own exceptions
      with contextlib.suppress(OSError):  # the disk may be full
        self._mirror.mark_unwritten()
      if not self._failures:
        text = f'The run continues in {self._mirror.folder}, and tries again.'
        say(f'{self._explain(error)} {text}', file=sys.stderr)
      self._failures += 1
      return error
    if self._failures:
      say(f'{self._url} can be reached again and has all files.', file=sys.stderr)
    self._failures = 0
    return None

  def _explain(self, error: Exception) -> str:
    """Return what is wrong, with the local folder or else with the store, and what to do."""
    if isinstance(error, OSError):
      file = error.filename if isinstance(error.filename, str | os.PathLike) else ''
      is_here = file and pathlib.Path(file).is_relative_to(self._mirror.folder)
      if is_here or error.errno in _FULL:
        return describe_fault(error, file or self._mirror.folder) or explain(self._url, error)
    return explain(self._url, error)
