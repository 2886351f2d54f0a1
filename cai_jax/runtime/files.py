"""Folders and files that a run writes."""

import json
import os
import pathlib
import shutil
from typing import Any

from cai_jax.runtime.errors import UserError


def check_workdir(workdir: str | os.PathLike, needed_bytes: int = 0) -> None:
  """Makes the folder if it is absent.

  Raises:
    ValueError: if it cannot be written to, or its disk has less than `needed_bytes` left.
  """
  workdir = pathlib.Path(workdir)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    probe = workdir / f'.probe.{os.getpid()}'
    probe.write_bytes(b'probe')
    probe.unlink(missing_ok=True)  # another host's process may have the same id
  except OSError as error:
    raise UserError(f'workdir {workdir} cannot be written to: {error}') from error
  free = shutil.disk_usage(workdir).free
  if free < needed_bytes:
    raise UserError(
      f'workdir {workdir}: {free / 1e9:.1f} GB are free and the run needs about '
      f'{needed_bytes / 1e9:.1f} GB (checkpoints, model, journal); free some, take another disk, '
      'or lower train.keep.'
    )


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes indented JSON to `path`, all of it or nothing."""
  temporary = pathlib.Path(f'{path}.tmp')
  temporary.write_text(json.dumps(value, indent=2) + '\n', encoding='utf-8')
  os.replace(temporary, path)
