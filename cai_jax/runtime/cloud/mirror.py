"""A local folder and a store that is kept equal to it, so that a run may die at any moment.

`pull` fetches what the folder lacks, and `push` writes what changed. The store never claims more
than it has: files that describe others are read before the others and written after them, and
deleted before them. A file that grows is written in parts (`parts.py`).
"""

import concurrent.futures
import functools
import itertools
import math
import os
import pathlib
import threading
from collections.abc import Callable, Container, Iterable

from cai_jax.runtime.cloud.index import FOLDER as OWN
from cai_jax.runtime.cloud.index import (
  INDEX,
  STEP_MARKER,
  Index,
  claim_order,
  is_claim,
  is_record,
  is_same,
  parse_index,
  scan,
  step_folder,
  times,
)
from cai_jax.runtime.cloud.objects import Listing, Objects
from cai_jax.runtime.cloud.store import Entry, Store
from cai_jax.runtime.errors import StoppedError, UserError
from cai_jax.runtime.files import make_folder, replacing

UNWRITTEN = f'{OWN}/unwritten'  # a local file, while the store could not be reached
TRANSFERS = 8  # files that are moved at the same time
REFRESHES = 5  # listings, while other launches change the store between a listing and its reads


class Mirror:
  """A folder and its store, between which files are moved in both directions.

  One job uses both; `lease.hold` sees to that. If it has several processes, each has a folder and a
  mirror of its own. They write different files, and `refresh` fetches those of the others.

  Args:
    store: the store.
    folder: the folder, which is created if necessary.
    job: id of the job, from `lease.hold`.
    check: raises StoppedError if the job no longer holds the store; None if nothing is written.
    alone: whether the job has one process.
    leads: whether this mirror writes the index of the store; one of a job does.
    leave_out: tells which files are not moved, by their names.

  Attributes:
    folder: the folder.
  """

  def __init__(
    self,
    store: Store,
    folder: pathlib.Path,
    job: str,
    check: Callable[[], None] | None = None,
    alone: bool = True,
    leads: bool = True,
    leave_out: Callable[[str], bool] = lambda name: False,
  ):
    self.folder = folder
    self._store, self._job = store, job
    self._alone, self._leads = alone, leads
    self._check = check or (lambda: None)
    self._objects = Objects(store, folder, leave_out)
    self._has_pushed = False  # since `take_pushed` was called last
    self._mutex = threading.Lock()

  def pull(self) -> int:
    """Make the folder equal to the store, and return how many files were fetched.

    The one that leads deletes what is incomplete in the store; the others only fetch.

    What was not written to the store before this machine was interrupted stays, and the next push
    writes it. If another job has used the store since, or this one has several processes, what the
    store has replaces it: other processes may have written more than this machine has of theirs.

    Raises:
      UserError: if work would be replaced that one process did while it could not reach the store,
        which is more than the last seconds.
    """
    if not self._alone:
      return self._pull_among_others()
    local = self._read_local()
    here = self._objects.scan()
    kept = {name for name, stat in here.items() if not is_same(stat, local.files.get(name))}
    listed, remote = self._list()
    if local.job != remote.job:
      # The local index keeps the id of its job until all is fetched. So if this pull is cut short,
      # the next one does not take what is here for work of this job either.
      self._check_unwritten(kept)
      (self.folder / UNWRITTEN).unlink(missing_ok=True)
      kept = set()
    objects, listing = self._objects, self._objects.learn(listed, remote)
    self._delete(listing.broken)
    same = {
      name
      for name, stat in here.items()
      if is_same(stat, local.files.get(name)) and local.files[name] == listing.states.get(name)
    }
    for name in here.keys() - listing.states.keys() - kept:  # deleted in the store
      (self.folder / name).unlink()
    wanted = listing.states.keys() - kept - same
    self._fetch_all(listing, wanted)
    for name in listing.states.keys() - wanted:
      objects.known[name], objects.pieces[name] = listing.states[name], listing.pieces[name]
      objects.remember_end(name)
    self._delete(listing.unused)
    if not (self.folder / INDEX).exists():
      self._write_local(local)
    self.push(still=True)  # what is kept, before the store has the id of this job
    self._write_index()
    return len(wanted)

  def _pull_among_others(self) -> int:
    """Pull for one of several processes, whose files the others may be writing.

    What the folder has and the store has not is deleted: the last seconds of a process that was
    killed, and checkpoints, which several processes keep in the store.
    """
    local, everything = self._read_local(), scan(self.folder)
    changed = {n for n, stat in everything.items() if not is_same(stat, local.files.get(n))}
    self._check_unwritten(changed)
    (self.folder / UNWRITTEN).unlink(missing_ok=True)
    mine = self._objects.scan().keys() - changed
    self._objects.known = {name: local.files[name] for name in mine}
    for name in everything.keys() - mine:
      (self.folder / name).unlink()
    if self._leads:
      self._delete(self._objects.learn(*self._list()).broken)
    count = self.refresh()
    self._write_index()
    return count

  def refresh(self) -> int:
    """Fetch what other processes have written, and return how many files that were.

    What this process has written must be in the store, see `push`. If this fails, the folder has
    some of the files, and nothing that the next push would take for work of this process.

    Raises:
      FileNotFoundError: if the others delete objects between each listing and its reads.
    """
    with self._mutex:
      count = 0
      # Until all is fetched, the local index has no job. So if this process is killed, the next
      # start does not take what is half fetched for work of its own.
      self._write_local(Index('', self._objects.known))
      for attempt in range(REFRESHES):
        try:
          count += self._refresh_once()
          break
        except FileNotFoundError:  # such as a part that another launch has merged meanwhile
          if attempt + 1 == REFRESHES:
            raise
      self._write_local(Index(self._job, self._objects.known))
      return count

  def _refresh_once(self) -> int:
    """Fetch what one listing of the store has and the folder has not."""
    objects, listing = self._objects, self._objects.learn(*self._list())
    for name in objects.known.keys() - listing.states.keys():  # deleted by another process
      objects.forget(name)
    wanted = []
    for name, state in listing.states.items():
      old = objects.known.get(name)
      if old and (old.size, old.version) == (state.size, state.version):
        if name not in objects.pieces:
          objects.remember_end(name)
        objects.pieces[name] = listing.pieces[name]
      else:
        wanted.append(name)
    self._fetch_all(listing, wanted)
    return len(wanted)

  def fetch(self) -> None:
    """Fetch everything that the store has to an empty folder, and write nothing to the store.

    Raises:
      UserError: if a job deletes objects meanwhile, also at the second attempt.
    """
    for _ in range(2):
      listing = self._objects.learn(*self._list())
      # What has been deleted since the first attempt.
      for name in self._objects.scan().keys() - listing.states.keys():
        (self.folder / name).unlink()
      try:
        self._fetch_all(listing, listing.states)
        return
      except FileNotFoundError:  # such as a part that a running job has joined
        self._objects.known.clear()
    raise UserError(
      f'{self._store.url} changed while it was fetched, because a job is writing to it. Try again '
      'in some seconds.'
    )

  def _fetch_all(self, listing: Listing, names: Iterable[str]) -> None:
    """Fetch files of a listing."""
    self._each(
      lambda name: self._objects.fetch(name, listing.states[name], listing.pieces[name]), names
    )

  def _list(self) -> tuple[dict[str, Entry], Index]:
    """Return all objects of the store, and its index.

    Raises:
      UserError: if the workdir of another run is below the URL.
    """
    listed, index = self._store.list(), Index()
    names = (name for name in sorted(listed) if not name.startswith(f'{OWN}/'))
    if inner := next((name for name in names if f'/{OWN}/' in name), ''):
      raise UserError(
        f'{self._store.url} contains the workdir {self._store.url}/{inner.split(f"/{OWN}/")[0]}. '
        'Give the URL of that, or one that has no workdir below it.'
      )
    if INDEX in listed:
      index = parse_index(self._store.read(INDEX), f'{self._store.url}/{INDEX}')
    return listed, index

  def _check_unwritten(self, names: set[str]) -> None:
    """Check that no work of an earlier job waits in the folder to be written to the store."""
    if names and (self.folder / UNWRITTEN).exists():
      raise UserError(
        f'{self.folder} has {len(names)} files that could not be written to {self._store.url}. '
        'Only a run of one process could use them, before another job uses the store. Delete the '
        'folder to continue from what the store has, or move it away to keep the files.'
      )

  def mark_unwritten(self) -> None:
    """Record that the folder has work that the store does not have, until a push succeeds."""
    if self._alone and (self.folder / OWN).is_dir():
      (self.folder / UNWRITTEN).touch()

  def push(self, still: bool = False, join: bool = False) -> bool:
    """Write to the store what changed in the folder, and return whether anything did.

    Args:
      still: whether no file changes meanwhile. Otherwise files that change now wait, except
        records, of which the complete lines are written.
      join: whether parts are joined and lines without end are written.

    Raises:
      StoppedError: if the folder is gone, so that its files are not to be deleted in the store, or
        another job has taken the store over.
    """
    with self._mutex:
      if not (self.folder / INDEX).exists():
        raise StoppedError(
          f'{self.folder} was deleted while a run used it. Start the same command again to '
          f'continue from what {self._store.url} has.'
        )
      self._check()
      # The store gets the folder as it is now: what is written from here on waits for the next
      # push. Claims are read first, so what they describe is complete, and in the scan below.
      # Records may be appended to at any time: they go up to the last line that the scan saw.
      moment = math.inf if still else self._now()
      claims = self._read_claims(moment)
      here = self._objects.scan()
      gone = {name for name in self._objects.known if name not in here and name not in claims}
      cut = {step_folder(name) for name in gone} - {''}
      first = {name for name in gone if is_claim(name)}
      first |= {f'{step}/{STEP_MARKER}' for step in cut} & self._objects.known.keys()
      changed = {
        name
        for name, stat in here.items()
        if not is_claim(name)
        and (is_record(name) or stat.st_mtime_ns < moment)
        and self._has_marker(name, claims)
        and not is_same(stat, self._objects.known.get(name))
      }
      if join:
        changed |= {name for name, p in self._objects.pieces.items() if len(p) > 1 and name in here}
      send = functools.partial(self._objects.send, here, join)
      self._delete(sorted(first, key=claim_order, reverse=True))
      moved = self._each(send, filter(is_record, changed))
      moved += self._each(send, itertools.filterfalse(is_record, changed))
      self._check()  # the files may have taken long
      for name in sorted(claims.keys() - first, key=lambda n: claim_order(n, claims[n][1])):
        content, stat = claims[name]
        self._objects.note(name, stat, self._store.write(name, content))
      self._delete(sorted(gone - first))
      is_new = any(moved) or bool(claims or gone or first)
      if is_new:
        self._has_pushed = True
        self._write_index()
      (self.folder / UNWRITTEN).unlink(missing_ok=True)
      return is_new

  def take_pushed(self) -> bool:
    """Return whether anything was pushed since the last call of this function."""
    with self._mutex:
      has_pushed, self._has_pushed = self._has_pushed, False
      return has_pushed

  def _has_marker(self, name: str, claims: Container[str]) -> bool:
    """Return whether a file is in no checkpoint, or the store has or gets that one's marker.

    Without it the next start would take the checkpoint in the store for a broken one.
    """
    step = step_folder(name)
    marker = f'{step}/{STEP_MARKER}'
    return not step or marker in claims or marker in self._objects.known

  def _now(self) -> int:
    """Return the time of the folder's file system, in nanoseconds."""
    probe = self.folder / OWN / 'now'
    probe.write_bytes(b'now')
    return probe.stat().st_mtime_ns

  def _read_claims(self, moment: float) -> dict[str, tuple[bytes, os.stat_result]]:
    """Return the content of all changed files that describe others, before those are looked at.

    Args:
      moment: the time before which they were written, in nanoseconds.
    """
    claims = {}
    for name, stat in self._objects.scan().items():
      is_new = stat.st_mtime_ns < moment and not is_same(stat, self._objects.known.get(name))
      if is_claim(name) and is_new:
        try:
          with open(self.folder / name, 'rb') as file:
            now = os.fstat(file.fileno())
            if (now.st_ino, *times(now)) == (stat.st_ino, *times(stat)):  # not replaced since
              claims[name] = file.read(), stat
        except FileNotFoundError:  # deleted since
          continue
    return claims

  def _delete(self, names: list[str]) -> None:
    """Delete objects one after the other, with their parts."""
    if names:
      self._check()
    self._objects.delete(names)

  def _each(self, move: Callable[[str], object], names: Iterable[str]) -> list[object]:
    """Move several files at the same time, and raise the first error."""
    with concurrent.futures.ThreadPoolExecutor(TRANSFERS) as pool:
      moves = [pool.submit(move, name) for name in sorted(names)]
      try:
        return [move.result() for move in moves]
      except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise

  def _write_index(self) -> None:
    """Write what folder and store have in common to the folder, and the one that leads to both."""
    self._check()
    index = Index(self._job, self._objects.known)
    self._write_local(index)
    if self._leads:
      self._store.write(INDEX, index.to_bytes())

  def _read_local(self) -> Index:
    """Return the index in the folder, which is created if necessary."""
    make_folder(self.folder / OWN)
    path = self.folder / INDEX
    return parse_index(path.read_bytes(), path) if path.exists() else Index()

  def _write_local(self, index: Index) -> None:
    with replacing(self.folder / INDEX) as temporary:
      temporary.write_bytes(index.to_bytes())
