"""The folder of a run that was given as a path or as a URL."""

import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from cai_jax.runtime import lock, processes
from cai_jax.runtime.cloud import direct, lease
from cai_jax.runtime.cloud.keeper import Keeper
from cai_jax.runtime.cloud.mirror import Mirror
from cai_jax.runtime.cloud.nesting import check_outer, find_outer
from cai_jax.runtime.cloud.store import Store, check_writable, is_url, open_store
from cai_jax.runtime.errors import StoppedError, UserError
from cai_jax.runtime.files import cache_folder
from cai_jax.runtime.replicas import launched_replica
from cai_jax.runtime.terminal import say

SCRATCH = 'CAI_JAX_SCRATCH'  # environment variable: where folders of URLs are kept


@dataclasses.dataclass(frozen=True)
class Workdir:
  """Where a run works.

  Attributes:
    folder: the local folder.
    store: the store with the same files; None for a folder that was given as a path.
  """

  folder: str
  store: Store | None = None

  def show(self, text: str) -> str:
    """Return a text for the user, with the URL in place of the local folder."""
    return text.replace(self.folder, self.store.url) if self.store else text

  @contextlib.contextmanager
  def open(self) -> Iterator[Callable[[], None]]:
    """Keep the folder and the store equal while the block runs.

    What the store has is fetched first. What the block writes reaches the store within seconds, and
    all of it at the end, also after an error or a signal. Messages of UserErrors name the URL.

    Yields:
      A function to call when a stage has ended and no file changes.

    Raises:
      UserError: if the store cannot be used, or another job uses it.
      StoppedError: if the store is away when the block ends; then the folder has everything.
    """
    if self.store is None:
      yield lambda: None
      return
    with self._shown_errors(), _mirrored(self.store, self.folder) as stage_ended:
      yield stage_ended

  @contextlib.contextmanager
  def look(self) -> Iterator[pathlib.Path]:
    """Yield a folder with the files of the run, and write nothing to the store.

    Raises:
      UserError: if the store cannot be used.
    """
    if self.store is None:
      yield pathlib.Path(self.folder)
      return
    check_writable(self.store)
    check_outer(self.store)
    with tempfile.TemporaryDirectory(prefix='cai_jax-') as folder:
      looked = Workdir(folder, self.store)
      with looked._shown_errors():
        with self.store.asking():
          Mirror(self.store, pathlib.Path(folder), '').fetch()
        yield pathlib.Path(folder)

  @contextlib.contextmanager
  def _shown_errors(self) -> Iterator[None]:
    """Name the URL in the messages of UserErrors of the block."""
    try:
      yield
    except UserError as error:
      error.args = (self.show(str(error)), *error.args[1:])
      raise


def resolve_workdir(workdir: str) -> Workdir:
  """Return where a run works that was given a path or a URL. Nothing is read or written yet.

  Args:
    workdir: a path, which is taken as it is, or a URL.

  Raises:
    UserError: if the URL has no store, or its package is missing.
  """
  if not is_url(workdir):
    return Workdir(workdir)
  store = open_store(workdir)
  return Workdir(str(scratch_folder(store.url)), store)


@contextlib.contextmanager
def _mirrored(store: Store, folder: str) -> Iterator[Callable[[], None]]:
  """Keep a folder of each process equal to a store while the block runs; see `Workdir.open`."""
  replica, launches = launched_replica()
  alone = jax.process_count() == launches == 1
  leads = jax.process_index() == replica == 0

  def check() -> None:
    check_writable(store)
    check_outer(store)

  processes.run_on_process_0('use the store', check)
  # A process of the last start may still be alive, after the one that held the lock was killed.
  here = contextlib.nullcontext() if alone else lock.hold(pathlib.Path(folder).parent, private=True)
  with _hold(store) as held, here:
    leave_out = (lambda name: False) if alone else direct.is_checkpoint
    own = pathlib.Path(folder)
    mirror = Mirror(store, own, held.job, held.check, alone=alone, leads=leads, leave_out=leave_out)
    _fetch(store, mirror)
    keeper = Keeper(mirror, store.url, alone)
    try:
      with direct.working_in(folder, store, None if alone else keeper):
        yield keeper.finish_stage
    except BaseException:
      try:
        keeper.close(join=False, in_time=False)
      except StoppedError as error:
        say(str(error), file=sys.stderr)
      raise
    _close(keeper, join=launches == 1)


@contextlib.contextmanager
def _hold(store: Store) -> Iterator[lease.Lease]:
  """Hold a store for all processes of this job while the block runs; process 0 has the lock."""
  replica, launches = launched_replica()
  place = lease.replica_store(store, replica)
  with contextlib.ExitStack() as stack:
    take = functools.partial(stack.enter_context, lease.hold(place, replicas=launches))
    held = processes.run_on_process_0('lock the store', take)
    if jax.process_count() > 1:
      values = [*bytes.fromhex(held.job), held.number] if held else [0] * 7
      *job, number = multihost_utils.broadcast_one_to_all(np.array(values, np.int32)).tolist()
      held = held or lease.Lease(bytes(job).hex(), place, number)
    assert held is not None
    yield held


def _fetch(store: Store, mirror: Mirror) -> None:
  """Fetch what the store has: first in the process that leads, which deletes what is incomplete."""

  def fetch() -> None:
    with store.asking():
      if count := mirror.pull():
        say(f'{store.url}: fetched {count} files to {mirror.folder}')

  def follow() -> None:
    if jax.process_index() != 0:
      with store.asking():
        mirror.pull()

  processes.run_on_process_0('fetch the files of the run', fetch)
  processes.run_on_all_processes('fetch the files of the run', follow)


def _close(keeper: Keeper, join: bool) -> None:
  """Write what is left at the end of a run, in process 0 last: it may join the parts of all."""

  def close() -> None:
    if jax.process_index() != 0:
      keeper.close(join=False)

  def close_last() -> None:
    if jax.process_count() > 1:
      keeper.receive()
    keeper.close(join)

  processes.run_on_all_processes('write the last files', close)
  processes.run_on_process_0('write the last files', close_last)


@contextlib.contextmanager
def open_part(workdir: str, part: str) -> Iterator[Workdir]:
  """Yield a folder with a part of a run's files, and write back what the block changes in it.

  Args:
    workdir: a path, which is yielded as it is, or a URL.
    part: name of a folder of the run; nothing else is fetched.

  Raises:
    UserError: if the store cannot be used, or another job uses it.
  """
  if not is_url(workdir):
    yield Workdir(workdir)
    return
  store = open_store(workdir)
  check_writable(store)
  with store.asking():
    outer = find_outer(store) or store  # a run of an experiment is locked together with that
  with lease.hold(outer) as held, tempfile.TemporaryDirectory(prefix='cai_jax-') as folder:
    root, place = pathlib.Path(folder), Workdir(folder, store)
    with store.asking():
      for name in store.list(part):
        store.download(name, root / name)
    before = _contents(root)
    with place._shown_errors():
      yield place
    with store.asking():
      for name, digest in _contents(root).items():
        if before.get(name) != digest:
          held.check()
          store.upload(name, root / name)


def scratch_folder(url: str) -> pathlib.Path:
  """Return the local folder of a URL, which is below CAI_JAX_SCRATCH or in the user's cache.

  Each process of each launch has a folder of its own, also where several run on one host.

  Its name is the last part of the URL, because a report shows the name of its folder. Characters
  other than letters, digits and _.=+- become underscores.

  Args:
    url: the URL.
  """
  parent = os.environ.get(SCRATCH) or cache_folder('workdirs')
  digest = hashlib.sha256(url.encode()).hexdigest()[:16]
  process, (replica, _) = jax.process_index(), launched_replica()
  if process or replica:
    digest += f'-{replica}-{process}'
  name = re.sub(r'[^\w.=+-]+', '_', url.rpartition('/')[2])[-60:].lstrip('.') or 'run'
  return pathlib.Path(os.path.realpath(os.path.expanduser(parent)), digest, name)


def refuse_url(path: str | os.PathLike, what: str) -> None:
  """Raise UserError if a path is a URL.

  Args:
    path: the path.
    what: what needs a local folder, as the subject of a sentence.
  """
  if is_url(path):
    raise UserError(f'{what} needs a local folder, and {path} is a URL. Give a path.')


def _contents(folder: pathlib.Path) -> dict[str, str]:
  """Return a digest of each file of a folder, by name."""
  return {
    path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in folder.rglob('*')
    if path.is_file()
  }
