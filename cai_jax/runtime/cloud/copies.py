"""Local copies of files and folders at URLs. All other code reads the copies, as local paths.

A copy is made once on each host and kept in the user's cache directory, under a name made from the
URL and from the store's version of each object. So an object that has changed is copied again, and
a run that reads the former copy is not disturbed.
"""

import fnmatch
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence

import filelock

from cai_jax.runtime.cloud.store import Entry, Store, is_url, open_store
from cai_jax.runtime.errors import UserError, show
from cai_jax.runtime.files import cache_folder, free_bytes, make_folder
from cai_jax.runtime.terminal import say

FOLDER = 'inputs'  # in the cache directory
MODEL = 'config.json'  # a folder with this file is a model
# Code, and formats that can hold code. Nothing here reads them.
_NEVER = ('*.py', '*.so', '*.pkl', '*.pickle', '*.bin', '*.pt', '*.pth', '*.ckpt', '*.h5')
GIB = 2**30

# A process uses one version of an object from its start to its end.
_copies: dict[tuple[str, tuple[str, ...]], pathlib.Path] = {}
_origins: dict[str, str] = {}  # copy → URL


def local_copy(url: str | os.PathLike, patterns: Sequence[str] = ()) -> pathlib.Path:
  """Return a local copy of a file or folder, which is made if this host has none.

  Several processes may call this at once: one of them copies, and the others wait. If it is killed,
  the next call copies the files that are missing. Pickles and Python files are not copied.

  Args:
    url: the URL of an object, or of a folder of objects.
    patterns: if the folder is a model, that is, if it has the file config.json, the names of the
      files to copy, such as '*.safetensors'. () copies all.

  Returns:
    The copy; its name is the last part of the URL.

  Raises:
    UserError: if there is no such object, it cannot be read, or it does not fit on the disk.
  """
  key = str(url).rstrip('/'), tuple(patterns)
  if key not in _copies:
    store = open_store(url)
    copy = _find_copy(store, patterns)
    _copies[key], _origins[str(copy.resolve())] = copy, store.url
  return _copies[key]


def local_path(path: str, patterns: Sequence[str] = ()) -> str:
  """Return the local copy of a URL, and every other text as it is.

  Args:
    path: a URL, a path, or text that only may be one.
    patterns: as for `local_copy`.

  Raises:
    UserError: as for `local_copy`.
  """
  return str(local_copy(path, patterns)) if is_url(path) else path


def origin(path: str | os.PathLike) -> str:
  """Return the URL of a copy that this process uses, and every other path as it is.

  Args:
    path: an absolute path.
  """
  return _origins.get(str(path), str(path))


def _find_copy(store: Store, patterns: Sequence[str]) -> pathlib.Path:
  with store.asking():
    entries = _choose(store, store.list(), patterns)
  name = store.url.rpartition('/')[2]
  content = json.dumps([store.url, sorted(entries.items())])
  identifier = hashlib.sha256(content.encode()).hexdigest()[:16]
  cache = make_folder(cache_folder(FOLDER))
  copy = cache / identifier / name
  if not _is_complete(copy, entries):
    with filelock.FileLock(cache / f'.{identifier}.lock'):
      if not _is_complete(copy, entries):
        _make_copy(store, entries, patterns, copy)
  return copy


def _choose(store: Store, listed: Mapping[str, Entry], patterns: Sequence[str]) -> dict[str, Entry]:
  """Return the objects to copy, by name; '' is a single object."""
  if not listed:
    raise UserError(f'{store.url} does not exist. Correct the URL, or upload it first.')
  chosen = {
    name: entry
    for name, entry in listed.items()
    if not any(fnmatch.fnmatchcase(name.lower(), never) for never in _NEVER)
  }
  if patterns and MODEL in chosen:
    chosen = {
      name: entry
      for name, entry in chosen.items()
      if '/' not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }
  if not chosen:
    raise UserError(
      f'{store.url} has only files that are not read, such as {next(iter(listed))}. Models must be '
      'in the format safetensors.'
    )
  for name, entry in chosen.items():
    if '..' in name.split('/') or '\\' in name or name.startswith('/'):
      raise UserError(f'{store.url} has an object with the name {show(name)}. Rename it.')
    if not entry.version:
      raise UserError(
        f'{store.url}: its server does not say when a file changes. Download it, and give the path.'
      )
  return chosen


def _is_complete(copy: pathlib.Path, entries: Mapping[str, Entry]) -> bool:
  """Return whether a copy has every object in its size."""
  try:
    return all((copy / name).stat().st_size == entry.size for name, entry in entries.items())
  except OSError:
    return False


def _make_copy(
  store: Store, entries: Mapping[str, Entry], patterns: Sequence[str], copy: pathlib.Path
) -> None:
  """Copy objects, and show the copy to others only when it is complete and of one version."""
  partial = copy.parent.with_name(f'.{copy.parent.name}.part')  # continued after a kill
  target = partial / copy.name
  missing = {n: e for n, e in entries.items() if not _is_complete(target, {n: e})}
  size = sum(entry.size for entry in missing.values())
  if size > (free := free_bytes(copy.parents[1])):
    raise UserError(
      f'{store.url} needs {size / GIB:.1f} GiB, but the disk of {copy.parents[1]} has '
      f'{free / GIB:.1f} GiB. Free some space, delete copies there that you no longer need, or set '
      'XDG_CACHE_HOME to a folder of another disk.'
    )
  files = f'{len(missing)} file{"s" * (len(missing) != 1)}'
  say(f'copying {store.url} ({files}, {size / GIB:.2f} GiB) to {copy}')
  with store.asking():
    for name in missing:
      store.download(name, target / name if name else target)
    is_same = _choose(store, store.list(), patterns) == entries
  if not is_same or not _is_complete(target, entries):
    shutil.rmtree(partial)
    raise UserError(f'{store.url} has changed while it was copied. Start the same command again.')
  shutil.rmtree(copy.parent, ignore_errors=True)  # a damaged copy
  partial.rename(copy.parent)
