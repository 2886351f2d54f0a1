"""Checkpoints that Orbax writes straight to a store, because no process has all of their files.

Several processes write one checkpoint: each has its own part of the arrays, and process 0 combines
the parts. In a run on a store, no folder is shared, so the checkpoints are written to the store.
Orbax does that for Google Cloud Storage (0.12.8); see https://github.com/google/orbax/pull/2739 for
Amazon S3. All other files of a run are in a folder of each process, which its mirror keeps equal to
the store (`mirror.py`).
"""

import contextlib
import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator

import jax
from etils import epath

from cai_jax.runtime.cloud.store import explain, is_url, split_url
from cai_jax.runtime.errors import StoppedError, UserError

SCHEMES = ('gs', 'gcs')  # of the stores to which Orbax writes
_CHECKPOINTS = re.compile(r'(?:^|.*/)checkpoints/')


@dataclasses.dataclass(frozen=True)
class _Mirrored:
  """The folder of a run on a store.

  Attributes:
    folder: the local folder.
    url: URL of the store.
    is_private: whether other processes have folders of their own.
  """

  folder: pathlib.Path
  url: str
  is_private: bool

  @property
  def is_direct(self) -> bool:
    """Whether checkpoints are written to the store."""
    return self.is_private and split_url(self.url)[0] in SCHEMES


_open: list[_Mirrored] = []  # at most one at a time


def is_checkpoint(name: str) -> bool:
  """Return whether a file of a run belongs to the checkpoints of a training."""
  return bool(_CHECKPOINTS.match(name))


@contextlib.contextmanager
def working_in(folder: str | os.PathLike, url: str) -> Iterator[None]:
  """Make `place` and `is_private` answer for the folder of a run on a store while the block runs.

  Args:
    folder: the local folder.
    url: URL of the store.
  """
  _open.append(_Mirrored(pathlib.Path(folder), url, jax.process_count() > 1))
  try:
    yield
  finally:
    _open.pop()


def _find(folder: str | os.PathLike) -> _Mirrored | None:
  """Return the run whose folder a path is, or is in."""
  path = pathlib.Path(os.path.abspath(folder))
  return next((run for run in _open if path.is_relative_to(run.folder)), None)


def is_private(folder: str | os.PathLike) -> bool:
  """Return whether a folder belongs to this process, and the others have copies of their own."""
  run = _find(folder)
  return run is not None and run.is_private


def place(folder: str | os.PathLike) -> epath.Path:
  """Return where the checkpoints of a training are: a folder, or a URL.

  Args:
    folder: the local folder of the checkpoints.
  """
  path = pathlib.Path(os.path.abspath(folder))
  run = _find(path)
  if run is None or not run.is_direct:
    return epath.Path(path)
  return epath.Path(run.url) / path.relative_to(run.folder).as_posix()


def check_training(folder: str | os.PathLike) -> None:
  """Check that the processes of a training can write its checkpoints.

  Args:
    folder: the folder of the run.

  Raises:
    UserError: if they share no folder, and Orbax cannot write to the store.
  """
  run = _find(folder)
  if run is not None and run.is_private and not run.is_direct:
    raise UserError(
      f'{run.url}: several processes can write checkpoints to gs:// only, because Orbax supports '
      'no other store. Train with one process, give the processes a folder on a file system that '
      'they share, or leave the stages train and prefer out of --stages here.'
    )


@contextlib.contextmanager
def asking(place: str | os.PathLike) -> Iterator[None]:
  """Raise a StoppedError if the block cannot write checkpoints to a store.

  Args:
    place: where they are. For a local folder, nothing is done.
  """
  try:
    yield
  except (UserError, FileExistsError):
    raise
  except Exception as error:  # every library has its own exceptions
    if not is_url(place):
      raise
    text = explain(str(place), error)
    raise StoppedError(f'{text} Then start the same command again to continue.') from error
