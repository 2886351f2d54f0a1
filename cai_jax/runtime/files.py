"""Folders and files that a run writes.

Paths go through `etils.epath`, so these functions also accept URLs of object stores such as
`gs://bucket/folder`. A whole run does not accept them: it needs a local or a shared filesystem,
because the journal appends to its files, and processes rely on atomic renames to find each other's
shards.
"""

import json
import os
import shutil
from typing import Any

from etils import epath

from cai_jax.runtime.errors import UserError


def check_workdir(workdir: str | os.PathLike, needed_bytes: int = 0) -> None:
  """Create a folder if it does not exist, and check that a run can write to it.

  Args:
    workdir: the folder.
    needed_bytes: free disk space that the run needs.

  Raises:
    UserError: if the folder is not writable, or its disk has too little free space.
  """
  folder = epath.Path(workdir)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f'.probe.{os.getpid()}'
    probe.write_bytes(b'probe')
    probe.unlink(missing_ok=True)  # another host's process may have the same id
  except OSError as error:
    raise UserError(
      f'workdir {workdir} is not writable: {error}. Choose another folder.'
    ) from error
  free = shutil.disk_usage(folder).free
  if free < needed_bytes:
    raise UserError(
      f'workdir {workdir} has {free / 1e9:.1f} GB free, and the run needs about '
      f'{needed_bytes / 1e9:.1f} GB for checkpoints, model and journal. Free some space, choose '
      'another disk, or lower train.keep.'
    )


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
  target = epath.Path(path)
  temporary = target.with_name(f'{target.name}.tmp')
  temporary.write_text(json.dumps(value, indent=2) + '\n', encoding='utf-8')
  temporary.replace(target)


def read_json(path: str | os.PathLike, expected: type = dict) -> Any:
  """Return the content of a JSON file.

  Args:
    path: the file.
    expected: type of the content, dict or list.

  Raises:
    UserError: if the file cannot be read, is not JSON, or its content has another type.
  """
  try:
    value = json.loads(epath.Path(path).read_text(encoding='utf-8'))
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror}.') from error
  except (ValueError, RecursionError) as error:  # also for integers with too many digits
    raise UserError(f'{path} is not valid JSON: {error}. Correct the file.') from error
  if not isinstance(value, expected):
    kind = 'object' if expected is dict else 'array'
    raise UserError(f'{path} contains a {type(value).__name__}. It must contain a JSON {kind}.')
  return value
