"""The lock of a store: at most one running job writes to a URL.

It works like the lock of a folder (`cai_jax.runtime.lock`): an object with a number that grows, of
which the highest counts. The store creates an object only once, and its clock decides when a holder
that no longer writes its object has failed. A job that ends leaves an object NUMBER.free. Replicas
that are launches of their own have a lock each.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from cai_jax.runtime import lock
from cai_jax.runtime.cloud.index import FOLDER
from cai_jax.runtime.cloud.store import Store
from cai_jax.runtime.errors import StoppedError
from cai_jax.runtime.terminal import say

LEASE = f'{FOLDER}/lock'
REPLICAS = f'{FOLDER}/replicas'  # with the lock of each replica after the first


@dataclasses.dataclass(frozen=True)
class Lease:
  """The right of a job to write to a store, which it loses if another job takes the store over.

  Attributes:
    job: id of the job, 12 hex digits.
    store: the store.
    number: its number in the lock.
  """

  job: str
  store: Store
  number: int

  def check(self) -> None:
    """Check that the job still holds the store; call it before each write.

    Raises:
      StoppedError: if another job has taken the store over, or the lock was deleted.
    """
    if reason := self.find_loss():
      raise StoppedError(f'{reason}. This job writes nothing more.')

  def find_loss(self) -> str:
    """Return why the job no longer holds the store, or '' if it does."""
    latest = max(_numbers(self.store), default=0)
    if latest == self.number:
      return ''
    if not latest:
      return f'the lock of {self.store.url} is gone, because {LEASE} was deleted'
    owner = lock.describe_owner(_read_owner(self.store, latest))
    return (
      f'{self.store.url} was taken over by {owner}, because this job was suspended, or could not '
      'reach the store, for too long'
    )


@contextlib.contextmanager
def hold(store: Store, ended: Callable[[str], None] | None = None, **facts: Any) -> Iterator[Lease]:
  """Hold a store for this job while the block runs.

  Args:
    store: the store.
    ended: called with the reason if another job has taken the store; None ends the process.
    **facts: what else the lock says of the job, of JSON types.

  Yields:
    The lease, which has the id of the job.

  Raises:
    UserError: if another job holds the store; the message says which, and since when.
  """
  job = uuid.uuid4().hex[:12]
  owner = {'job': job, **lock.describe_process(), 'since': lock.utc_now(), **facts}
  content = json.dumps(owner).encode()
  with store.asking():
    held = Lease(job, store, _acquire(store, content))
  number, stop = held.number, threading.Event()
  arguments = held, content, stop, ended or _end_process
  watch = threading.Thread(target=_watch, args=arguments, daemon=True)
  watch.start()
  try:
    yield held
  finally:
    stop.set()
    watch.join()
    with contextlib.suppress(Exception):  # the store may be away; then the lock becomes stale
      if _numbers(store).get(number):
        store.write(_name(number, free=True), b'')
        store.delete(_name(number))


def find_owners(store: Store) -> dict[int, dict[str, Any]]:
  """Return what the locks of a store say of the jobs that hold it, by the number of the replica.

  Args:
    store: the store.
  """
  folders = (name.removeprefix(f'{REPLICAS}/').partition('/')[0] for name in store.list(REPLICAS))
  replicas = {0, *(int(folder) for folder in folders if folder.isdecimal())}
  owners = {replica: _find_owner(replica_store(store, replica)) for replica in sorted(replicas)}
  return {replica: owner for replica, owner in owners.items() if owner}


def replica_store(store: Store, replica: int) -> Store:
  """Return the store that has the lock of a replica.

  Args:
    store: the store of the run.
    replica: number of the replica, which is a launch of its own; 0 if there is one launch.
  """
  root = store.path(f'{REPLICAS}/{replica}')
  return dataclasses.replace(store, root=root) if replica else store  # messages name the run


def _find_owner(store: Store) -> dict[str, Any]:
  """Return what a lock says of the job that holds it; empty if no job does."""
  numbers = _numbers(store)
  latest = max(numbers, default=0)
  beat = _last_beat(store, latest) if numbers.get(latest) else None
  if beat is None or (_now(store) - beat).total_seconds() > lock.STALE_SECONDS:
    return {}
  owner = _read_owner(store, latest)
  return {} if lock.has_ended(owner) else owner


def _acquire(store: Store, content: bytes) -> int:
  """Take the next number of a store's lock, and return it.

  Raises:
    UserError: if another job holds the store.
  """
  numbers = _numbers(store)
  before = max(numbers, default=0)
  beat = None
  if numbers.get(before):
    beat, owner = _last_beat(store, before), _read_owner(store, before)
    age = (_now(store) - beat).total_seconds() if beat else 0.0
    if age <= lock.STALE_SECONDS and not lock.has_ended(owner):
      raise lock.refusal(store.url, owner, age)
  mine = before + 1
  try:
    store.create(_name(mine), content)
  except FileExistsError:  # another job has just taken it
    raise lock.refusal(store.url, _read_owner(store, mine), 0.0) from None
  # The holder may have woken up, or another may have taken a higher number.
  latest = max(_numbers(store))
  if latest != mine or (beat and _last_beat(store, before) not in (beat, None)):
    other = latest if latest != mine else before
    owner = _read_owner(store, other)
    store.delete(_name(mine))
    raise lock.refusal(store.url, owner, 0.0)
  for number in numbers:
    store.delete(_name(number))
    store.delete(_name(number, free=True))
  return mine


def _watch(
  held: Lease, content: bytes, stop: threading.Event, ended: Callable[[str], None]
) -> None:
  """Write the object again until the job ends, and call `ended` if another job took the store."""
  while not stop.wait(lock.HEARTBEAT_SECONDS):
    try:
      reason = held.find_loss()
      if not reason:
        held.store.write(_name(held.number), content)
    except Exception:  # the store may be away for a moment
      continue
    if reason and not stop.is_set():
      return ended(reason)


def _end_process(reason: str) -> None:
  """End this process at once: what it would write belongs to another job."""
  try:
    say(f'error: {reason}. This job has ended and writes nothing more.', file=sys.stderr)
  finally:  # also if the terminal is gone
    os._exit(1)


def _numbers(store: Store) -> dict[int, bool]:
  """Return whether each number of the lock is held."""
  numbers: dict[int, bool] = {}
  for name in store.list(LEASE):
    stem, _, suffix = name.rpartition('/')[2].partition('.')
    if stem.isdecimal() and suffix in ('', 'free'):
      numbers[int(stem)] = numbers.get(int(stem), True) and not suffix
  return numbers


def _name(number: int, free: bool = False) -> str:
  return f'{LEASE}/{number:06d}{".free" if free else ""}'


def _last_beat(store: Store, number: int) -> datetime.datetime | None:
  """Return when the object of a number was written last; None if it is gone."""
  try:
    return store.modified(_name(number))
  except FileNotFoundError:
    return None


def _now(store: Store) -> datetime.datetime:
  """Return the time of the store, whose clock may differ from that of this machine."""
  name = f'{LEASE}/now.{uuid.uuid4().hex}'
  store.write(name, b'now')
  try:
    return store.modified(name)
  finally:
    store.delete(name)


def _read_owner(store: Store, number: int) -> dict[str, Any]:
  """Return what the object of a number says of its job; empty if it is gone."""
  try:
    owner = json.loads(store.read(_name(number)))
  except (FileNotFoundError, ValueError):
    return {}
  return owner if isinstance(owner, dict) else {}
