"""Folders and files that a run writes.

A run writes to a local or a shared filesystem, because the journal appends to its files, and
processes rely on atomic renames to find each other's shards. Object stores offer neither, so a run
in a store works in a local folder, which `cai_jax.runtime.cloud` keeps equal to the store.
"""

import collections
import contextlib
import errno
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from cai_jax.runtime.errors import StoppedError, UserError, show

# Of a JSON file's lists and objects. Code that walks over deeper ones would exhaust the stack.
MAX_DEPTH = 100

# What to do about a file that cannot be written, by the number of the error.
_ADVICE = {
  **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), 'Free some space'),
  errno.EFBIG: 'Raise the limit of the file size (ulimit -f)',
  **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), 'Make its folder writable'),
  **dict.fromkeys(
    (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ESTALE),
    'Its folder was deleted, moved or replaced. Put it back',
  ),
  errno.EIO: 'Check the disk',
  **dict.fromkeys((errno.EMFILE, errno.ENFILE), 'Raise the limit of open files (ulimit -n)'),
}


def describe_fault(error: BaseException, path: object = None) -> str:
  """Return what is wrong with a file and what to do, or '' if an error is no fault of the machine.

  Libraries in C++ raise their own exceptions; these quote the operating system.

  Args:
    error: the error; its causes count too.
    path: the file or folder; None takes the one that the error names.
  """
  pending, seen = [error], set()
  while pending:
    error = pending.pop()
    if id(error) in seen:
      continue
    seen.add(id(error))
    path = path or getattr(error, 'filename', None)
    number = getattr(error, 'errno', None)
    if number not in _ADVICE:
      number = next((n for n in _ADVICE if os.strerror(n) in str(error)), None)
    if number in _ADVICE and path:
      return (
        f'{path} cannot be used: {os.strerror(number)}. {_ADVICE[number]}, and start '
        'the same command again to continue.'
      )
    linked = [error.__cause__, error.__context__, *getattr(error, 'exceptions', ())]
    pending += [other for other in linked if other is not None]
  return ''


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
  """Raise a short error if the block cannot write to a path; everything that writes goes here.

  Args:
    path: the file or folder that the block writes.

  Raises:
    StoppedError: if the disk is full, or the path is read-only or gone; it says what to do.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:  # libraries in C++ do not raise OSError
    if not (fault := describe_fault(error, path)):
      raise
    raise StoppedError(fault) from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yield a temporary path in the same folder, which replaces the file when the block ends.

  A reader sees the old file or the new one, also after a crash of the machine. If the block fails,
  the old file stays. What a kill leaves behind has a fixed name, and the next start replaces it.

  Args:
    path: the file; its folder must exist.

  Raises:
    StoppedError: see `writing`.
  """
  target = pathlib.Path(path)
  temporary = target.with_name(f'.{target.name}.tmp')
  with writing(path):
    try:
      yield temporary
      with open(temporary, 'rb') as file:
        os.fsync(file.fileno())
      temporary.replace(target)
    except BaseException:
      with contextlib.suppress(OSError):
        temporary.unlink()
      raise


def make_folder(path: str | os.PathLike) -> pathlib.Path:
  """Create a folder and those above it, if they do not exist, and return its path.

  Raises:
    StoppedError: see `writing`.
  """
  folder = pathlib.Path(path)
  with writing(folder):
    folder.mkdir(parents=True, exist_ok=True)
  return folder


def check_workdir(workdir: str | os.PathLike) -> None:
  """Create a folder if it does not exist, and check that a run can write to it.

  Args:
    workdir: the folder.

  Raises:
    UserError: if the folder is not writable.
  """
  folder = pathlib.Path(workdir)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f'.probe.{os.getpid()}'
    probe.write_bytes(b'probe')
    probe.unlink(missing_ok=True)  # another host's process may have the same id
  except OSError as error:
    raise UserError(
      f'The folder {workdir} is not writable: {error}. Choose another workdir, or make it writable.'
    ) from error


def free_bytes(folder: str | os.PathLike) -> int:
  """Return the free space of the disk of a folder, in bytes."""
  return shutil.disk_usage(folder).free


def cache_folder(name: str) -> pathlib.Path:
  """Return the folder of cai_jax for something in the user's cache directory; it may not exist.

  Args:
    name: what the folder is for.
  """
  base = os.environ.get('XDG_CACHE_HOME', '')
  if not os.path.isabs(base):  # the XDG specification says to ignore such a path
    base = os.path.expanduser('~/.cache')
  return pathlib.Path(base, 'cai_jax', name)


def expand_path(path: str | os.PathLike) -> str:
  """Return a path with '~' and, if it exists, with every folder in it made absolute and real.

  A file keeps its own name even if it is a symbolic link, because its suffix may matter.

  Args:
    path: a path, or text that only may be one.
  """
  expanded = os.path.expanduser(path)
  if not os.path.exists(expanded):
    return expanded
  if os.path.isdir(expanded):
    return os.path.realpath(expanded)
  folder, name = os.path.split(os.path.abspath(expanded))
  return os.path.join(os.path.realpath(folder), name)


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Write a value as indented JSON, atomically: a reader sees the old file or the new one.

  Args:
    path: the file; its folder must exist.
    value: anything that `json.dumps` accepts.
  """
  with replacing(path) as temporary:
    temporary.write_text(json.dumps(value, indent=2) + '\n', encoding='utf-8')


def parse_json(text: str | bytes) -> Any:
  """Return the value of a JSON text in which no object has a key twice.

  Args:
    text: the JSON text.

  Raises:
    ValueError: if the text is not JSON, or an object has a key twice.
    RecursionError: if it is nested too deeply.
  """
  return json.loads(text, object_pairs_hook=_unique_pairs)


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  entries = dict(pairs)
  if len(entries) < len(pairs):
    twice, _ = collections.Counter(key for key, _ in pairs).most_common(1)[0]
    raise ValueError(f'an object has the key {show(twice)} twice')
  return entries


def read_json(path: str | os.PathLike, expected: type = dict) -> Any:
  """Return the content of a JSON file.

  Args:
    path: the file.
    expected: type of the content, dict or list.

  Raises:
    UserError: if the file cannot be read, is not JSON, or its content has another type.
  """
  try:
    value = parse_json(pathlib.Path(path).read_text(encoding='utf-8'))
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror}.') from error
  except (ValueError, RecursionError) as error:  # also for integers with too many digits
    raise UserError(f'{path} is not valid JSON: {error}. Correct the file.') from error
  if _is_deeper(value, MAX_DEPTH):
    raise UserError(f'{path} is nested more than {MAX_DEPTH} levels deep. Correct the file.')
  if not isinstance(value, expected):
    kind = 'object' if expected is dict else 'array'
    raise UserError(f'{path} contains a {type(value).__name__}. It must contain a JSON {kind}.')
  return value


def _is_deeper(value: Any, depth: int) -> bool:
  """Return whether dicts and lists are nested more than `depth` times, without recursion."""
  level = [value]
  for _ in range(depth):
    level = [
      child
      for item in level
      if isinstance(item, dict | list)
      for child in (item.values() if isinstance(item, dict) else item)
    ]
    if not level:
      return False
  return any(isinstance(item, dict | list) for item in level)
