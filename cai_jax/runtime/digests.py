"""Digests of files by their content, which are remembered while a file has not been touched."""

import hashlib
import os
import pathlib
import time
from collections.abc import Iterable

from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import read_json, write_json

_SETTLED_SECONDS = 2.0  # a file that was touched later may be touched again at the same time stamp

# Path → (size, time of the content, time of the inode, inode, digest). No program can set the time
# of the inode, so a file that was replaced in place differs, even with its old size and date.
_known: dict[str, tuple[int, int, int, int, str]] = {}


def digest_file(path: str | os.PathLike) -> str:
  """Return the SHA-256 of a file's content as 64 hex digits.

  A file of many gigabytes is read once: as long as its size, times and inode stay the same, its
  digest is remembered, by this process and by `save_digests` for later ones.

  Args:
    path: the file.

  Raises:
    OSError: if the file cannot be read.
  """
  path = os.path.realpath(path)
  state = _state(path)
  if path in _known and _known[path][:4] == state:
    return _known[path][4]
  with open(path, 'rb') as file:
    digest = hashlib.file_digest(file, 'sha256').hexdigest()
  is_settled = time.time() - max(state[1], state[2]) / 1e9 > _SETTLED_SECONDS
  if is_settled and _state(path) == state:
    _known[path] = *state, digest
  return digest


def digest_files(folder: pathlib.Path, names: Iterable[str]) -> str:
  """Return one digest of the names and contents of files, 16 hex digits.

  Args:
    folder: the folder of the files.
    names: their names; the order matters.

  Raises:
    OSError: if a file cannot be read.
  """
  lines = (f'{name} {digest_file(folder / name)}\n' for name in names)
  return hashlib.sha256(''.join(lines).encode()).hexdigest()[:16]


def save_digests(path: str | os.PathLike) -> None:
  """Write the digests that this process knows.

  Args:
    path: the JSON file.
  """
  write_json(path, _known)


def load_digests(path: str | os.PathLike) -> None:
  """Read digests that an earlier process saved. They save time only, so a damaged file is ignored.

  Args:
    path: the JSON file; it need not exist.
  """
  try:
    entries = read_json(path)
  except (OSError, UserError):
    return
  for name, entry in entries.items():
    if isinstance(entry, list) and [type(part) for part in entry] == [int] * 4 + [str]:
      _known.setdefault(name, tuple(entry))


def _state(path: str) -> tuple[int, int, int, int]:
  stat = os.stat(path)
  return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino
