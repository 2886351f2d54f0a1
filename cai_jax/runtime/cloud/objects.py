"""The files of a folder as objects of a store: one for each file, and parts where it has grown."""

import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from cai_jax.runtime.cloud import parts
from cai_jax.runtime.cloud.index import FileState, Index, is_left_out, scan, unfinished
from cai_jax.runtime.cloud.parts import PARTS, Range, part_name, read_range
from cai_jax.runtime.cloud.store import Entry, Store
from cai_jax.runtime.files import make_folder, replacing

_TAIL = 4096  # bytes before the end of what was sent that must be there if a file has only grown


class Listing(NamedTuple):
  """What a store has.

  Attributes:
    states: state of each file, by name.
    pieces: the first object of each file and its parts.
    broken: objects of incomplete checkpoints.
    unused: parts that a kill left behind, after they were merged or their file was replaced.
  """

  states: dict[str, FileState]
  pieces: dict[str, list[Range]]
  broken: list[str]
  unused: list[str]


class Objects:
  """Moves single files between a folder and a store, and remembers what the store has.

  Args:
    store: the store.
    folder: the folder.
    leave_out: tells which files are not moved, by their names.

  Attributes:
    known: state of each file that the store has, by name.
    pieces: the first object of each file and its parts, as ranges of bytes.
  """

  def __init__(self, store: Store, folder: pathlib.Path, leave_out: Callable[[str], bool]):
    self._store, self._folder, self._leave_out = store, folder, leave_out
    self.known: dict[str, FileState] = {}
    self.pieces: dict[str, list[Range]] = {}
    self._ends: dict[str, tuple[int, bytes]] = {}  # their inodes, and what the store has last

  def scan(self) -> dict[str, os.stat_result]:
    """Return the files of the folder that are moved, by name."""
    return {name: stat for name, stat in scan(self._folder).items() if not self._leave_out(name)}

  def send(self, here: Mapping[str, os.stat_result], join: bool, name: str) -> bool:
    """Write a file to the store: what it has grown by, or all of it."""
    stat = here[name]
    try:
      if not join and self._has_grown(name, stat):
        is_sent = False
        while self._send_growth(name, stat):
          is_sent = True
        return is_sent
      if name.endswith('.jsonl') and not join and 0 < stat.st_size <= parts.LARGEST:
        content = read_range(self._folder / name, (0, stat.st_size))
        content = content[: content.rfind(b'\n') + 1]
        if not content:
          return False
        entry = self._store.write(name, content)
      else:
        entry = self._store.upload(name, self._folder / name)
    except FileNotFoundError:
      if (self._folder / name).exists():  # then the bucket is gone
        raise
      return False
    self.note(name, stat, entry)
    return True

  def _has_grown(self, name: str, stat: os.stat_result) -> bool:
    """Return whether the store has the beginning of a file, and lines were appended to it."""
    if name not in self._ends or not name.endswith('.jsonl'):
      return False
    inode, end = self._ends[name]
    known = self.known[name].size
    if inode != stat.st_ino or not known or stat.st_size <= known:
      return False
    return read_range(self._folder / name, (known - len(end), known)) == end

  def _send_growth(self, name: str, stat: os.stat_result) -> bool:
    """Write complete lines that were appended to a file, and return whether there were any."""
    path, known = self._folder / name, self.known[name]
    end = min(stat.st_size, known.size + parts.LARGEST)
    lines = read_range(path, (known.size, end)).rpartition(b'\n')[0]
    if not lines:
      return False
    new = known.size, known.size + len(lines) + 1
    kept, piece = parts.merge(self.pieces[name], new)
    content = read_range(path, piece)
    if not kept:
      self.note(name, stat, self._store.write(name, content))
      return True
    self._store.write(part_name(name, known.version, piece), content)
    self._delete_parts(name, [old for old in self.pieces[name] if old not in kept])
    self.pieces[name] = [*kept, piece]
    self.known[name] = FileState(piece[1], stat.st_mtime_ns, known.version)
    self.remember_end(name)
    return True

  def note(self, name: str, stat: os.stat_result, entry: Entry) -> None:
    """Remember that a file was written as one object, and delete the parts of the one before it.

    The file may have grown since it was looked at. Then its size tells the next push.
    """
    old = self.pieces.get(name, [])
    self._delete_parts(name, old)
    self.pieces[name] = [(0, entry.size)]
    self.known[name] = FileState(entry.size, stat.st_mtime_ns, entry.version)
    self.remember_end(name)

  def _delete_parts(self, name: str, pieces: Iterable[Range]) -> None:
    version = self.known[name].version if name in self.known else ''
    for piece in pieces:
      if piece[0]:
        self._store.delete(part_name(name, version, piece))

  def fetch(self, name: str, state: FileState, pieces: list[Range]) -> None:
    """Write an object and its parts to the local file, with the time of the file that it was.

    If the folder has the beginning, only what follows is fetched.

    Args:
      name: the file.
      state: its state in the store, from `learn`.
      pieces: its first object and its parts.
    """
    old, target = self.known.get(name), self._folder / name
    make_folder(target.parent)
    if old and old.version == state.version and 0 < old.size < state.size:
      self._append(name, state, pieces, old.size)
    else:
      with replacing(target) as temporary:
        self._store.fs.get_file(self._store.path(name), str(temporary))
        with open(temporary, 'ab') as file:
          for piece in pieces[1:]:
            file.write(self._store.read(part_name(name, state.version, piece)))
    if state.mtime_ns:
      os.utime(target, ns=(state.mtime_ns, state.mtime_ns))
    stat = target.stat()
    self.known[name] = FileState(stat.st_size, stat.st_mtime_ns, state.version)
    self.pieces[name] = pieces
    self.remember_end(name)

  def _append(self, name: str, state: FileState, pieces: list[Range], size: int) -> None:
    """Append what parts have to a local file, which has the first bytes."""
    contents = [
      self._store.read(part_name(name, state.version, (begin, end)))[max(size - begin, 0) :]
      for begin, end in pieces[1:]
      if end > size
    ]
    with open(self._folder / name, 'r+b') as file:
      file.truncate(size)
      file.seek(size)
      file.writelines(contents)

  def forget(self, name: str) -> None:
    """Delete a local file that the store does not have any more."""
    (self._folder / name).unlink(missing_ok=True)
    for table in (self.known, self.pieces, self._ends):
      table.pop(name, None)

  def remember_end(self, name: str) -> None:
    """Note the inode of a file that may grow, and the last bytes of what the store has."""
    if not name.endswith('.jsonl'):
      return
    size = self.known[name].size
    try:
      with open(self._folder / name, 'rb') as file:
        file.seek(max(size - _TAIL, 0))
        self._ends[name] = os.fstat(file.fileno()).st_ino, file.read(min(size, _TAIL))
    except FileNotFoundError:
      self._ends.pop(name, None)

  def delete(self, names: list[str]) -> None:
    """Delete objects one after the other, with their parts."""
    for name in names:
      self._delete_parts(name, self.pieces.pop(name, []))
      self._store.delete(name)
      self.known.pop(name, None)
      self._ends.pop(name, None)

  def learn(self, listed: Mapping[str, Entry], index: Index) -> Listing:
    """Return what a listing says of the files that are moved."""
    files = {name: entry for name, entry in listed.items() if not is_left_out(name)}
    broken, groups = unfinished({*files}), parts.group_parts(listed)
    states, pieces = {}, {}
    for name in files.keys() - broken:
      if self._leave_out(name):
        continue
      entry, before = files[name], index.files.get(name)
      chain = parts.follow(entry.size, groups.get((name, entry.version), []))
      pieces[name] = [(0, entry.size), *chain]
      mtime = before.mtime_ns if before and before.version == entry.version else 0
      states[name] = FileState(pieces[name][-1][1], mtime, entry.version)
    used = {
      part_name(name, states[name].version, piece) for name in states for piece in pieces[name][1:]
    }
    unused = [name for name in listed if name.startswith(f'{PARTS}/') and name not in used]
    return Listing(states, pieces, sorted(broken), unused)
