"""The lock of a folder: at most one running job writes to it.

A lock is a file in `FOLDER/.lock`, named by a number that grows with each job. The job whose file
has the highest number holds the folder. Nobody creates a number twice, because the file system
creates a file only once, also on NFS. A job that ends renames its file to `NUMBER.free`.

The holder touches its file every `HEARTBEAT_SECONDS`. If it has not done so for `STALE_SECONDS`, or
was a process of this machine that no longer exists, another job may take the next number. A holder
that was suspended for that long notices it when it continues, and ends at once.
"""

import contextlib
import datetime
import functools
import json
import os
import pathlib
import platform
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from cai_jax.runtime import processes
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.terminal import say

FOLDER = '.lock'
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0


class _Lock(NamedTuple):
  """The file of a lock: its path, its number, and whether a job holds it."""

  path: pathlib.Path
  number: int
  is_held: bool


@contextlib.contextmanager
def hold(workdir: str | os.PathLike, private: bool = False, **facts: Any) -> Iterator[str]:
  """Hold a folder for this job while the block runs.

  All processes of the job call this function together. They share the id of the job.

  Args:
    workdir: the folder, on a filesystem that all processes share; it is created if necessary.
    private: whether it is a folder of this process instead, and other processes hold theirs.
    **facts: what else the lock's file says of the job, of JSON types.

  Yields:
    The id of the job, 12 hex digits.

  Raises:
    UserError: if another job holds the folder; the message says which, and since when.
  """
  folder = pathlib.Path(workdir) / FOLDER
  job = uuid.uuid4().bytes[:6]
  together = processes.run_on_all_processes if private else processes.run_on_process_0
  number = together(f'lock {workdir}', lambda: _acquire(folder, job.hex(), facts))
  if jax.process_count() > 1 and not private:  # process 0 chose both
    values = np.array([*job, number or 0], np.int32)
    *letters, number = multihost_utils.broadcast_one_to_all(values).tolist()
    job = bytes(letters)
  path, ended = folder / _name(number or 0), threading.Event()
  has_taken = private or jax.process_index() == 0
  watch = threading.Thread(target=_watch, args=(path, number, has_taken, ended), daemon=True)
  watch.start()
  try:
    yield job.hex()
  finally:
    ended.set()
    watch.join()
    if has_taken:
      with contextlib.suppress(OSError):  # the folder may be gone
        os.rename(path, path.with_suffix('.free'))


def find_owner(workdir: str | os.PathLike) -> dict[str, Any]:
  """Return what the lock's file says of the job that holds a folder; empty if no job does.

  Args:
    workdir: the folder, which need not exist.
  """
  folder = pathlib.Path(workdir) / FOLDER
  if not folder.is_dir():
    return {}
  latest = _latest(folder)
  owner = _read_owner(latest.path)
  is_active = latest.is_held and _now(folder) - _last_beat(latest) <= STALE_SECONDS
  return owner if is_active and not has_ended(owner) else {}


def _acquire(folder: pathlib.Path, job: str, facts: Mapping[str, Any]) -> int:
  """Take the next number of a lock, and return it.

  Raises:
    UserError: if another job holds the folder, or its lock cannot be written.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    before = _latest(folder)
    beat = _last_beat(before)
    if before.is_held:
      age = _now(folder) - beat
      owner = _read_owner(before.path)
      if age <= STALE_SECONDS and not has_ended(owner):
        raise refusal(folder.parent, owner, age)
    mine = folder / _name(before.number + 1)
    try:
      with open(mine, 'x', encoding='utf-8') as file:
        json.dump({'job': job, **describe_process(), 'since': utc_now(), **facts}, file)
    except FileExistsError:  # another job has just taken it
      raise refusal(folder.parent, _read_owner(mine), 0.0) from None
    except OSError:
      mine.unlink(missing_ok=True)
      raise
    # The holder may have woken up, or this process may have read the folder long ago.
    latest = _latest(folder)
    other = latest if latest.path != mine else before
    if other is latest or _last_beat(before) not in (beat, 0.0):
      mine.unlink(missing_ok=True)
      if not other.is_held:
        return _acquire(folder, job, facts)
      raise refusal(folder.parent, _read_owner(other.path), 0.0)
    before.path.unlink(missing_ok=True)
  except OSError as error:
    raise UserError(
      f'This job cannot lock its workdir, because {folder} cannot be written: {error}. Free the '
      'disk, or choose another workdir.'
    ) from error
  return before.number + 1


def _watch(path: pathlib.Path, number: int, touches: bool, ended: threading.Event) -> None:
  """Touch the file of a lock until the job ends, and end the process if another took the lock."""
  while not ended.wait(HEARTBEAT_SECONDS):
    try:
      if touches:
        with contextlib.suppress(FileNotFoundError):  # the job that took the lock deletes the file
          os.utime(path)
      latest = _latest(path.parent)
    except (FileNotFoundError, NotADirectoryError):
      latest = _Lock(path, 0, is_held=False)
    except OSError:  # a shared filesystem may be unreachable for a moment
      continue
    if latest.number != number and not ended.is_set():
      _end_process(path, latest)


def _end_process(path: pathlib.Path, latest: _Lock) -> None:
  """End this process at once, without the writes of an orderly end: the folder is another's."""
  workdir = path.parent.parent
  reason = f'the lock of {workdir} is gone, because the folder or its {FOLDER} was deleted'
  if latest.number:
    owner = describe_owner(_read_owner(latest.path))
    reason = f'{workdir} was taken over by {owner}, because this job was suspended for too long'
  try:
    say(f'error: {reason}. This job has ended and writes nothing more.', file=sys.stderr)
  finally:  # also if the terminal is gone
    os._exit(1)


def _latest(folder: pathlib.Path) -> _Lock:
  """Return the lock with the highest number; number 0 if there was none yet."""
  locks = [_Lock(folder / _name(0), 0, is_held=False)]
  for path in folder.iterdir():
    if path.stem.isdecimal() and path.suffix in ('', '.free'):
      locks.append(_Lock(path, int(path.stem), is_held=not path.suffix))
  return max(locks, key=lambda lock: (lock.number, not lock.is_held))


def _name(number: int) -> str:
  return f'{number:06d}'


def _last_beat(lock: _Lock) -> float:
  """Return when the file of a lock was touched last; 0 if it is gone."""
  try:
    return os.stat(lock.path).st_mtime
  except FileNotFoundError:
    return 0.0


def _now(folder: pathlib.Path) -> float:
  """Return the time of the file system, whose clock may differ from that of this machine."""
  probe = folder / f'now.{uuid.uuid4().hex}'
  probe.touch()
  now = probe.stat().st_mtime
  probe.unlink(missing_ok=True)
  return now


def _read_owner(path: pathlib.Path) -> dict[str, Any]:
  """Return what a lock's file says of its job; empty while the job is still writing it."""
  try:
    owner = json.loads(path.read_bytes())
  except (OSError, ValueError):
    return {}
  return owner if isinstance(owner, dict) else {}


def has_ended(owner: Mapping[str, Any]) -> bool:
  """Return whether a job's process ran on this machine and no longer exists.

  Args:
    owner: what the lock's file says of the job.
  """
  here = describe_process()
  if not here['machine'] or any(owner.get(name) != here[name] for name in ('host', 'machine')):
    return False
  return _process_start(owner.get('pid')) != owner.get('process_start')


def describe_process() -> dict[str, Any]:
  """Return what identifies this process."""
  pid = os.getpid()
  return {
    'host': platform.node(),
    'machine': _machine(),
    'pid': pid,
    'process_start': _process_start(pid),
  }


@functools.cache
def _machine() -> str:
  """Return the boot and the namespace in which process ids count; '' if they are unknown."""
  try:
    boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    return f'{boot} {os.readlink("/proc/self/ns/pid")}'
  except OSError:
    return ''


def _process_start(pid: Any) -> str:
  """Return when a process of this machine started, in clock ticks since the boot; '' if it ended.

  A later process may have the same id, but not the same start.
  """
  try:
    fields = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
  except OSError:
    return ''
  return '' if fields[0] in 'ZX' else fields[19]  # the state, and field 22 of the file


def utc_now() -> str:
  """Return the time as a lock's file gives it."""
  return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')


def describe_owner(owner: Mapping[str, Any]) -> str:
  """Return which job holds a folder, as a part of a sentence.

  Args:
    owner: what the lock's file says of it.
  """
  if not owner:
    return 'another job'
  names = ('job', 'pid', 'host', 'since')
  job, pid, host, since = (owner.get(name, 'unknown') for name in names)
  return f'job {job} (process {pid} on {host}, since {since})'


def refusal(workdir: object, owner: Mapping[str, Any], age: float) -> UserError:
  """Return the error of a job that asks for a folder which another one holds.

  Args:
    workdir: the folder, or the URL of a store.
    owner: what the lock's file says of the other job.
    age: seconds since it was active.
  """
  return UserError(
    f'{workdir} belongs to {describe_owner(owner)}, which was last active '
    f'{max(age, 0):.0f} s ago. Wait until it ends, stop it, or choose another workdir. If its '
    f'machine has failed, start again in {max(STALE_SECONDS - age, 0) + 1:.0f} s.'
  )
