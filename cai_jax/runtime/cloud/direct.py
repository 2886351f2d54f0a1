"""What code has to know of a run on a store whose processes share no folder.

Each process has a folder of its own, which its mirror keeps equal to the store (`mirror.py`). Only
checkpoints are written straight to the store, because no process has all of their files: each has
its own part of the arrays, and process 0 combines the parts. Orbax does that for Google Cloud
Storage (0.12.8); see https://github.com/google/orbax/pull/2739 for Amazon S3.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from etils import epath

from cai_jax.runtime import processes
from cai_jax.runtime.cloud import lease
from cai_jax.runtime.cloud.store import Store, explain, is_url, split_url
from cai_jax.runtime.errors import StoppedError, UserError

SCHEMES = ('gs', 'gcs')  # of the stores to which Orbax writes
# Names of errors of the network and of rights, in TensorStore, gcsfs and its libraries.
_AWAY = re.compile(
  'UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|CANCELLED|PERMISSION_DENIED|'
  'UNAUTHENTICATED|Timeout|Connect|Forbidden|HttpError|ClientError|RefreshError|TransportError'
)
_CHECKPOINTS = re.compile(r'(?:^|.*/)checkpoints/')


@dataclasses.dataclass(frozen=True)
class _Mirrored:
  """The folder of a run on a store.

  Attributes:
    folder: the local folder.
    store: the store.
    exchange: sends and fetches files; None if no other process has a folder of the run.
  """

  folder: pathlib.Path
  store: Store
  exchange: processes.Exchange | None

  @property
  def is_direct(self) -> bool:
    """Whether checkpoints are written to the store."""
    return self.exchange is not None and split_url(self.store.url)[0] in SCHEMES


_open: list[_Mirrored] = []  # at most one at a time


def is_checkpoint(name: str) -> bool:
  """Return whether a file of a run belongs to the checkpoints of a training."""
  return bool(_CHECKPOINTS.match(name))


@contextlib.contextmanager
def working_in(
  folder: str | os.PathLike, store: Store, exchange: processes.Exchange | None
) -> Iterator[None]:
  """Let the functions of this module answer for the folder of a run while the block runs.

  Args:
    folder: the local folder.
    store: the store.
    exchange: sends and fetches files; None if no other process has a folder of the run.
  """
  _open.append(_Mirrored(pathlib.Path(folder), store, exchange))
  try:
    with contextlib.nullcontext() if exchange is None else processes.exchanging(exchange):
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
  return run is not None and run.exchange is not None


def find_owners(folder: str | os.PathLike) -> dict[int, dict[str, Any]] | None:
  """Return which jobs hold the store of a run, by replica, or None for a run without a store.

  Args:
    folder: the local folder of the run.
  """
  run = _find(folder)
  if run is None:
    return None
  with run.store.asking():
    return lease.find_owners(run.store)


def fetch(folder: str | os.PathLike) -> None:
  """Fetch what other launches have written to the store of a run. Without a store, do nothing.

  Args:
    folder: the local folder of the run.

  Raises:
    StoppedError: if the store is away.
  """
  run = _find(folder)
  if run is not None and run.exchange is not None:
    run.exchange.send()
    run.exchange.receive()


def place(folder: str | os.PathLike) -> epath.Path:
  """Return where the checkpoints of a training are: a folder, or a URL.

  Args:
    folder: the local folder of the checkpoints.
  """
  path = pathlib.Path(os.path.abspath(folder))
  run = _find(path)
  if run is None or not run.is_direct:
    return epath.Path(path)
  bucket = run.store.url.partition('://')[2]
  return epath.Path(f'gs://{bucket}') / path.relative_to(run.folder).as_posix()


def check_training(folder: str | os.PathLike) -> None:
  """Check that the processes of a training can write its checkpoints.

  Args:
    folder: the folder of the run.

  Raises:
    UserError: if they share no folder, and Orbax cannot write to the store.
  """
  run = _find(folder)
  if run is not None and run.exchange is not None and not run.is_direct:
    raise UserError(
      f'{run.store.url}: several processes can write checkpoints to gs:// only, because Orbax '
      'supports no other store. Train with one process, give the processes a folder on a file '
      'system that they share, or leave the stages train and prefer out of --stages here.'
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


def check_reached(place: str | os.PathLike, error: Exception) -> None:
  """Check that a checkpoint could not be read because of its files, and not because of the store.

  Args:
    place: where it is. For a local folder, nothing is checked.
    error: what reading it has raised.

  Raises:
    StoppedError: if the store was away, or refused to answer.
  """
  if is_url(place) and _AWAY.search(f'{type(error).__name__} {error}'):
    with asking(place):
      raise error
