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
from collections.abc import Callable, Container, Iterable, Mapping

from cai_jax.runtime.cloud import parts
from cai_jax.runtime.cloud.index import FOLDER as OWN
from cai_jax.runtime.cloud.index import (
  INDEX,
  STEP_MARKER,
  FileState,
  Index,
  claim_order,
  is_claim,
  is_left_out,
  is_record,
  is_same,
  parse_index,
  scan,
  step_folder,
  times,
  unfinished,
)
from cai_jax.runtime.cloud.parts import PARTS, Range, part_name, read_range
from cai_jax.runtime.cloud.store import Entry, Store
from cai_jax.runtime.errors import StoppedError, UserError
from cai_jax.runtime.files import make_folder, replacing

UNWRITTEN = f'{OWN}/unwritten'  # a local file, while the store could not be reached
TRANSFERS = 8  # files that are moved at the same time
_TAIL = 4096  # bytes before the end of what was pushed that must be there if a file has only grown


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
    self._alone, self._leads, self._leave_out = alone, leads, leave_out
    self._check = check or (lambda: None)
    self._known: dict[str, FileState] = {}  # what the store has
    self._pieces: dict[str, list[Range]] = {}  # of files that grow: the first object, and parts
    self._ends: dict[str, tuple[int, bytes]] = {}  # their inodes, and what the store has last
    self._mutex = threading.Lock()

  def pull(self) -> int:
    """Make the folder equal to the store, and return how many files were fetched.

    What was not written to the store before this machine was interrupted stays, and the next push
    writes it. If another job has used the store since, or this one has several processes, what the
    store has replaces it: other processes may have written more than this machine has of theirs.

    Raises:
      UserError: if work would be replaced that one process did while it could not reach the store,
        which is more than the last seconds.
    """
    local = self._read_local()
    listed, remote = self._list()
    here = self._scan()
    kept = {name for name, stat in here.items() if not is_same(stat, local.files.get(name))}
    if local.job != remote.job or not self._alone:
      # The local index keeps the id of its job until all is fetched. So if this pull is cut short,
      # the next one does not take what is here for work of this job either.
      self._check_unwritten(kept)
      (self.folder / UNWRITTEN).unlink(missing_ok=True)
      kept = set()
    self._delete(self._learn(listed, remote))
    same = {
      name
      for name, stat in here.items()
      if is_same(stat, local.files.get(name)) and local.files[name] == self._known.get(name)
    }
    wanted = self._known.keys() - kept - same
    for name in here.keys() - self._known.keys() - kept:  # deleted in the store
      (self.folder / name).unlink()
    self._each(self._fetch, wanted)
    self._delete(self._unused_parts(listed))
    for name in self._known.keys() & self._scan().keys():
      self._remember_end(name)
    if not (self.folder / INDEX).exists():
      self._write_local(local)
    self.push(still=True)  # what is kept, before the store has the id of this job
    self._write_index()
    return len(wanted)

  def follow(self) -> int:
    """Make the folder equal to the store, and return how many files were fetched.

    A mirror that does not lead begins so, after the one that leads has pulled. What the folder has
    and the store has not is deleted: the last seconds of a process that was killed.
    """
    local, here = self._read_local(), self._scan()
    self._known = {
      name: local.files[name] for name, stat in here.items() if is_same(stat, local.files.get(name))
    }
    for name in here.keys() - self._known.keys():
      (self.folder / name).unlink()
    return self.refresh()

  def refresh(self) -> int:
    """Fetch what other processes have written, and return how many files that were.

    What this process has written must be in the store, see `push`.
    """
    with self._mutex:
      before = self._known
      self._known, self._pieces = {}, {}
      self._learn(*self._list())
      wanted = []
      for name, state in self._known.items():
        old = before.get(name)
        if old and (old.size, old.version) == (state.size, state.version):
          self._known[name] = old
        else:
          wanted.append(name)
      for name in before.keys() - self._known.keys():  # deleted by another process
        (self.folder / name).unlink(missing_ok=True)
      self._each(self._fetch, wanted)
      for name in self._known:
        self._remember_end(name)
      self._write_local(Index(self._job, self._known))
      return len(wanted)

  def fetch(self) -> None:
    """Fetch everything that the store has to an empty folder, and write nothing to the store.

    Raises:
      UserError: if a job deletes objects meanwhile, also at the second attempt.
    """
    for _ in range(2):
      self._known.clear()
      self._learn(*self._list())
      for name in self._scan().keys() - self._known.keys():  # deleted since the first attempt
        (self.folder / name).unlink()
      try:
        self._each(self._fetch, [*self._known])
        return
      except FileNotFoundError:  # such as a part that a running job has joined
        continue
    raise UserError(
      f'{self._store.url} changed while it was fetched, because a job is writing to it. Try again '
      'in some seconds.'
    )

  def _list(self) -> tuple[dict[str, Entry], Index]:
    """Return all objects of the store, and its index.

    Raises:
      UserError: if the workdir of another run is below the URL.
    """
    listed, index = self._store.list(), Index()
    if inner := next((name for name in sorted(listed) if f'/{OWN}/' in name), ''):
      raise UserError(
        f'{self._store.url} contains the workdir {self._store.url}/{inner.split(f"/{OWN}/")[0]}. '
        'Give the URL of that, or one that has no workdir below it.'
      )
    if INDEX in listed:
      index = parse_index(self._store.read(INDEX), f'{self._store.url}/{INDEX}')
    return listed, index

  def _learn(self, listed: Mapping[str, Entry], index: Index) -> list[str]:
    """Note the files that the store has, and return the objects of incomplete checkpoints."""
    files = {name: entry for name, entry in listed.items() if not is_left_out(name)}
    broken, groups = unfinished({*files}), parts.group_parts(listed)
    for name in files.keys() - broken:
      if self._leave_out(name):
        continue
      entry, before = files[name], index.files.get(name)
      chain = parts.follow(entry.size, groups.get((name, entry.version), []))
      self._pieces[name] = [(0, entry.size), *chain]
      mtime = before.mtime_ns if before and before.version == entry.version else 0
      self._known[name] = FileState(self._pieces[name][-1][1], mtime, entry.version)
    return sorted(broken)

  def _unused_parts(self, listed: Iterable[str]) -> list[str]:
    """Return parts that a kill left behind, after they were merged or their file was replaced."""
    used = {
      part_name(name, self._known[name].version, piece)
      for name, pieces in self._pieces.items()
      for piece in pieces[1:]
    }
    return [name for name in listed if name.startswith(f'{PARTS}/') and name not in used]

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
      here = self._scan()
      gone = {name for name in self._known if name not in here and name not in claims}
      cut = {step_folder(name) for name in gone} - {''}
      first = {name for name in gone if is_claim(name)}
      first |= {f'{step}/{STEP_MARKER}' for step in cut} & self._known.keys()
      changed = {
        name
        for name, stat in here.items()
        if not is_claim(name)
        and (is_record(name) or stat.st_mtime_ns < moment)
        and self._has_marker(name, claims)
        and not is_same(stat, self._known.get(name))
      }
      if join:
        changed |= {name for name, p in self._pieces.items() if len(p) > 1 and name in here}
      send = functools.partial(self._send, here, join)
      self._delete(sorted(first, key=claim_order, reverse=True))
      moved = self._each(send, filter(is_record, changed))
      moved += self._each(send, itertools.filterfalse(is_record, changed))
      self._check()  # the files may have taken long
      for name in sorted(claims.keys() - first, key=lambda n: claim_order(n, claims[n][1])):
        content, stat = claims[name]
        self._note(name, stat, self._store.write(name, content))
      self._delete([name for name in gone if name not in first])
      is_new = any(moved) or bool(claims or gone or first)
      if is_new:
        self._write_index()
      (self.folder / UNWRITTEN).unlink(missing_ok=True)
      return is_new

  def _has_marker(self, name: str, claims: Container[str]) -> bool:
    """Return whether a file is in no checkpoint, or the store has or gets that one's marker.

    Without it the next start would take the checkpoint in the store for a broken one.
    """
    step = step_folder(name)
    marker = f'{step}/{STEP_MARKER}'
    return not step or marker in claims or marker in self._known

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
    for name, stat in self._scan().items():
      is_new = stat.st_mtime_ns < moment and not is_same(stat, self._known.get(name))
      if is_claim(name) and is_new:
        try:
          with open(self.folder / name, 'rb') as file:
            now = os.fstat(file.fileno())
            if (now.st_ino, *times(now)) == (stat.st_ino, *times(stat)):  # not replaced since
              claims[name] = file.read(), stat
        except FileNotFoundError:  # deleted since
          continue
    return claims

  def _send(self, here: Mapping[str, os.stat_result], join: bool, name: str) -> bool:
    """Write a file to the store: what it has grown by, or all of it."""
    stat = here[name]
    try:
      if not join and self._has_grown(name, stat):
        is_sent = False
        while self._send_growth(name, stat):
          is_sent = True
        return is_sent
      if name.endswith('.jsonl') and not join and 0 < stat.st_size <= parts.LARGEST:
        content = read_range(self.folder / name, (0, stat.st_size))
        content = content[: content.rfind(b'\n') + 1]
        if not content:
          return False
        entry = self._store.write(name, content)
      else:
        entry = self._store.upload(name, self.folder / name)
    except FileNotFoundError:
      if (self.folder / name).exists():  # then the bucket is gone
        raise
      return False
    self._note(name, stat, entry)
    return True

  def _has_grown(self, name: str, stat: os.stat_result) -> bool:
    """Return whether the store has the beginning of a file, and lines were appended to it."""
    if name not in self._ends or not name.endswith('.jsonl'):
      return False
    inode, end = self._ends[name]
    known = self._known[name].size
    if inode != stat.st_ino or not known or stat.st_size <= known:
      return False
    return read_range(self.folder / name, (known - len(end), known)) == end

  def _send_growth(self, name: str, stat: os.stat_result) -> bool:
    """Write complete lines that were appended to a file, and return whether there were any."""
    path, known = self.folder / name, self._known[name]
    end = min(stat.st_size, known.size + parts.LARGEST)
    lines = read_range(path, (known.size, end)).rpartition(b'\n')[0]
    if not lines:
      return False
    new = known.size, known.size + len(lines) + 1
    kept, piece = parts.merge(self._pieces[name], new)
    content = read_range(path, piece)
    if not kept:
      self._note(name, stat, self._store.write(name, content))
      return True
    self._store.write(part_name(name, known.version, piece), content)
    self._delete_parts(name, [old for old in self._pieces[name] if old not in kept])
    self._pieces[name] = [*kept, piece]
    self._known[name] = FileState(piece[1], stat.st_mtime_ns, known.version)
    self._remember_end(name)
    return True

  def _note(self, name: str, stat: os.stat_result, entry: Entry) -> None:
    """Remember that a file was written as one object, and delete the parts of the one before it.

    The file may have grown since it was looked at. Then its size tells the next push.
    """
    old = self._pieces.get(name, [])
    self._delete_parts(name, old)
    self._pieces[name] = [(0, entry.size)]
    self._known[name] = FileState(entry.size, stat.st_mtime_ns, entry.version)
    self._remember_end(name)

  def _delete_parts(self, name: str, pieces: Iterable[Range]) -> None:
    version = self._known[name].version if name in self._known else ''
    for piece in pieces:
      if piece[0]:
        self._store.delete(part_name(name, version, piece))

  def _fetch(self, name: str) -> None:
    """Write an object and its parts to the local file, with the time of the file that it was."""
    known, target = self._known[name], self.folder / name
    make_folder(target.parent)
    with replacing(target) as temporary:
      self._store.fs.get_file(self._store.path(name), str(temporary))
      with open(temporary, 'ab') as file:
        for piece in self._pieces[name][1:]:
          file.write(self._store.read(part_name(name, known.version, piece)))
    if known.mtime_ns:
      os.utime(target, ns=(known.mtime_ns, known.mtime_ns))
    stat = target.stat()
    self._known[name] = FileState(stat.st_size, stat.st_mtime_ns, known.version)

  def _remember_end(self, name: str) -> None:
    """Note the inode of a file that may grow, and the last bytes of what the store has."""
    if not name.endswith('.jsonl'):
      return
    size = self._known[name].size
    try:
      with open(self.folder / name, 'rb') as file:
        file.seek(max(size - _TAIL, 0))
        self._ends[name] = os.fstat(file.fileno()).st_ino, file.read(min(size, _TAIL))
    except FileNotFoundError:
      self._ends.pop(name, None)

  def _delete(self, names: list[str]) -> None:
    """Delete objects one after the other, with their parts."""
    if names:
      self._check()
    for name in names:
      self._delete_parts(name, self._pieces.pop(name, []))
      self._store.delete(name)
      self._known.pop(name, None)
      self._ends.pop(name, None)

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
    index = Index(self._job, self._known)
    self._write_local(index)
    if self._leads:
      self._store.write(INDEX, index.to_bytes())

  def _read_local(self) -> Index:
    """Return the index in the folder, which is created if necessary."""
    make_folder(self.folder / OWN)
    path = self.folder / INDEX
    return parse_index(path.read_bytes(), path) if path.exists() else Index()

  def _scan(self) -> dict[str, os.stat_result]:
    """Return the files of the folder that are moved, by name."""
    return {name: stat for name, stat in scan(self.folder).items() if not self._leave_out(name)}

  def _write_local(self, index: Index) -> None:
    with replacing(self.folder / INDEX) as temporary:
      temporary.write_bytes(index.to_bytes())
