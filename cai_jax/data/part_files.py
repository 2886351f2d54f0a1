"""Parts of a table of examples in files, which several processes write and all of them map.

Rows of D_CAI, or comparisons, are rendered and tokenized in parts of `PART_ROWS`, or larger ones if
there would be very many. Each process of a run makes its share of the parts, with a worker process
on each of its cores if there are many rows. A part is written whole, so after a kill the next start
makes only those that are missing or damaged, and a resumed training makes none. The parts depend on
the rows and the settings alone, and never on who makes them.
"""

import concurrent.futures
import contextlib
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

import jax

from cai_jax.data.unit_table import Part, is_whole, map_part, save_part
from cai_jax.runtime import interruption, processes
from cai_jax.runtime.digests import digest_files
from cai_jax.runtime.errors import StoppedError
from cai_jax.runtime.files import make_folder, writing
from cai_jax.runtime.hardware import host_memory
from cai_jax.runtime.plugins import load_plugins, loaded_plugins
from cai_jax.runtime.progress import Progress
from cai_jax.runtime.terminal import say

FOLDER = 'examples'  # of the parts, in the folder of a training
PART_ROWS = 8192
MAX_PARTS = 256  # a file that is mapped stays open, and processes may open about a thousand
POOL_ROWS = 4 * PART_ROWS  # fewer rows take less time than workers need to start
WORKER_BYTES = 500 << 20  # memory of a worker, at most
_QUIET_SECONDS = 10.0  # before progress is shown
_KEY = re.compile('[0-9a-f]{16}')  # the folder of the parts of the same rows and settings
_CPU_LIMIT = pathlib.Path('/sys/fs/cgroup/cpu.max')  # of a container, in microseconds of a period


class Source(Protocol):
  """The rows that parts are made of."""

  @property
  def digest(self) -> str:
    """A digest of the rows."""
    ...

  def __len__(self) -> int: ...

  def batches(self, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[Any, ...]]:
    """Yield the arguments of `Maker.make_part` for ranges of rows, which ascend.

    They are sent to a worker, so they can be pickled.
    """
    ...


class Maker(Protocol):
  """What makes parts. Workers get a copy, so it can be pickled."""

  @property
  def digest(self) -> str:
    """A digest of all that a part depends on, besides the rows and the code."""
    ...

  @property
  def make_part(self) -> Callable[..., Part]:
    """Returns the part of a batch of the rows."""
    ...


def map_parts(rows: Source, maker: Maker, folder: str | os.PathLike) -> list[Part]:
  """Return the parts of all rows, after making those that the folder does not have yet.

  All processes of a run call this function together.

  Args:
    rows: what the parts are made of.
    maker: makes the parts.
    folder: a folder that all processes share. Parts of other rows or settings in it are deleted.

  Raises:
    UserError: if the examples of a row cannot be made.
    StoppedError: if a file cannot be written or read, a worker process ends, for lack of memory
      maybe, or processes have other versions of libraries.
    Interrupted: after SIGTERM or SIGINT; finished parts are kept.
  """
  size = max(PART_ROWS, -(-len(rows) // MAX_PARTS))
  key = _identify(rows, maker, size)
  own = pathlib.Path(folder) / key
  processes.run_on_process_0('prepare the folder of examples', lambda: _clear(own))
  parts = [
    (begin, min(begin + size, len(rows)), own / f'{number:06}.safetensors')
    for number, begin in enumerate(range(0, len(rows), size))
  ]
  is_same = processes.is_same_everywhere(key)
  cores = _count_cores()  # by all processes together
  mine = parts[jax.process_index() :: jax.process_count()]

  def make() -> None:
    if not is_same:
      raise StoppedError(
        f'{own} differs between the processes. All of them must see the same data, and have the '
        'same versions of cai_jax, tokenizers, transformers and jinja2.'
      )
    make_folder(own)
    _make_missing(rows, maker, [part for part in mine if not _is_there(part[2])], cores)

  def map_all() -> list[Part]:
    with writing(own):
      return [map_part(path) for _, _, path in parts]

  processes.run_on_all_processes('prepare the examples', make)
  return processes.run_on_all_processes('map the examples', map_all)


def _is_there(path: pathlib.Path) -> bool:
  """Return whether a part is there and whole; a line says if it is damaged."""
  if not path.exists():
    return False
  if is_whole(path):
    return True
  say(f'{path} is damaged, and is made again.', file=sys.stderr)
  return False


def delete_parts(folder: str | os.PathLike) -> None:
  """Delete the parts in a folder, and the folder if nothing else is in it.

  All processes of a run call this function together.

  Args:
    folder: the folder; it need not exist.
  """

  def delete() -> None:
    _delete_all(pathlib.Path(folder))
    with contextlib.suppress(OSError):  # the user has files there
      os.rmdir(folder)

  processes.run_on_process_0('delete the files of examples', delete)


def _clear(own: pathlib.Path) -> None:
  """Create the folder of these parts, and delete those of others beside it."""
  make_folder(own)
  _delete_all(own.parent, own)


def _delete_all(folder: pathlib.Path, but: pathlib.Path | None = None) -> None:
  """Delete the parts in a folder, except those in one of its folders, and nothing else."""
  for inner in folder.iterdir() if folder.is_dir() else ():
    if inner != but and _KEY.fullmatch(inner.name):
      shutil.rmtree(inner, ignore_errors=True)


def _identify(rows: Source, maker: Maker, size: int) -> str:
  """Return a digest of all that parts of `size` rows depend on, 16 hex digits."""
  package = pathlib.Path(__file__).parents[1]
  modules = ('data', 'dialogue')  # their code makes the parts
  code = sorted(
    str(path.relative_to(package)) for name in modules for path in (package / name).rglob('*.py')
  )
  names = 'tokenizers', 'transformers', 'jinja2'
  libraries = [importlib.metadata.version(name) for name in names]
  content = [rows.digest, len(rows), maker.digest, size, libraries]
  content += [digest_files(package, code), sorted(loaded_plugins().values())]
  return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _count_cores() -> int:
  """Return the number of cores for each process of this host. All processes call it together."""
  count = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
  count = min(count, _cpu_limit(), host_memory() // 2 // WORKER_BYTES)
  return max(1, count // processes.count_on_this_host())


def _cpu_limit() -> int:
  """Return how many cores the container of this process may use at the same time."""
  try:
    quota, period = map(int, _CPU_LIMIT.read_text().split())
  except (OSError, ValueError):  # not in a container, or one without a limit ('max')
    return os.cpu_count() or 1
  return max(1, quota // period)


Work = Sequence[tuple[int, int, pathlib.Path]]  # first row, end, and the file of each part
Report = Callable[[int, int], None]  # with the numbers of rows and of tokens of a part


def _make_missing(rows: Source, maker: Maker, work: Work, cores: int) -> None:
  """Make parts and write them, in this process or in workers."""
  total, done = sum(end - begin for begin, end, _ in work), 0
  with Progress('examples', 'row', quiet_seconds=_QUIET_SECONDS) as progress:
    tokens = 0

    def report(count: int, size: int) -> None:
      nonlocal done, tokens
      done, tokens = done + count, tokens + size
      progress(done, total, tokens)

    batches = rows.batches((begin, end) for begin, end, _ in work)
    if cores == 1 or total < POOL_ROWS:
      for (begin, end, path), batch in zip(work, batches, strict=True):
        report(end - begin, _make_one(maker, path, batch))
    else:
      _run_in_pool(cores, maker, work, batches, report)


def _run_in_pool(
  cores: int, maker: Maker, work: Work, batches: Iterator[tuple[Any, ...]], report: Report
) -> None:
  """Make parts in worker processes.

  Workers are new interpreters (`spawn`): JAX runs threads in this process, which a fork would copy
  in any state. A worker computes nothing on devices.
  """
  workers = min(cores, len(work))
  pool = concurrent.futures.ProcessPoolExecutor(
    workers,
    multiprocessing.get_context('spawn'),
    _start_worker,
    (maker, tuple(loaded_plugins())),
  )
  jobs: dict[concurrent.futures.Future[int], int] = {}  # of those not reported: number of rows

  def report_some() -> None:
    finished, _ = concurrent.futures.wait(jobs, return_when=concurrent.futures.FIRST_COMPLETED)
    for job in finished:
      report(jobs.pop(job), job.result())

  try:
    for (begin, end, path), batch in zip(work, batches, strict=True):
      jobs[pool.submit(_work, path, batch)] = end - begin
      while len(jobs) > workers:  # one batch waits in memory
        report_some()
    while jobs:
      report_some()
  except BrokenProcessPool as error:
    interruption.check()  # a signal to all processes ends the workers too
    raise StoppedError(
      'A worker process that makes training examples ended. If memory is short, give this process '
      'fewer cores, for example with taskset. A script of your own must start its work under '
      "`if __name__ == '__main__':`, because workers import it."
    ) from error
  finally:
    pool.shutdown(cancel_futures=True)  # parts that are being made are finished


_shared: list[Any] = []  # of a worker: the maker, or why it cannot work


def _start_worker(maker: Maker, plugins: Sequence[str]) -> None:
  """Prepare a worker, which ends with the process that started it."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
  signal.signal(signal.SIGTERM, signal.SIG_DFL)  # without a message of its own
  jax.config.update('jax_platforms', 'cpu')  # a plugin may use JAX; devices are the parent's
  try:
    load_plugins(plugins)
    _shared[:] = (maker,)
  except Exception as error:  # the pool would only say that a worker has ended
    _shared[:] = (error,)
  parent = multiprocessing.parent_process()
  assert parent is not None

  def follow() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=follow, daemon=True).start()


def _work(path: pathlib.Path, batch: tuple[Any, ...]) -> int:
  """Make a part in a worker."""
  (maker,) = _shared
  if isinstance(maker, Exception):
    raise maker
  return _make_one(maker, path, batch)


def _make_one(maker: Maker, path: pathlib.Path, batch: tuple[Any, ...]) -> int:
  """Make and write a part, and return the number of its tokens."""
  part = maker.make_part(*batch)
  save_part(path, part)
  return len(part.segments.values)
