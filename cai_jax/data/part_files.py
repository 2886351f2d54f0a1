"""Parts of a table of examples in files, which several processes write and all of them map.

Rows are rendered and tokenized in parts of `PART_ROWS`. Each process of a run makes its share of
the parts, with a worker process on each of its cores if there are many rows. A part is written
whole, so after a kill the next start makes only those that are missing, and a resumed training
makes none. The parts depend on the rows and the settings alone, and never on who makes them.
"""

import concurrent.futures
import functools
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

import jax

from cai_jax.data.d_cai import content_digest
from cai_jax.data.d_cai_rows import Rows
from cai_jax.data.unit_table import Part, map_part, save_part
from cai_jax.runtime import interruption, processes
from cai_jax.runtime.digests import digest_files
from cai_jax.runtime.errors import StoppedError
from cai_jax.runtime.files import make_folder
from cai_jax.runtime.plugins import load_plugins, loaded_plugins
from cai_jax.runtime.progress import Progress

FOLDER = 'examples'  # of the parts, in the folder of a training
PART_ROWS = 8192
POOL_ROWS = 4 * PART_ROWS  # fewer rows take less time than workers need to start
_QUIET_SECONDS = 10.0  # before progress is shown


class Maker(Protocol):
  """What makes parts. Workers get a copy, so it can be pickled."""

  @property
  def digest(self) -> str:
    """A digest of all that a part depends on, besides the rows and the code."""
    ...

  def make_part(self, rows: Any, begin: int, end: int) -> Part:
    """Return the part of some rows."""
    ...


def map_parts(rows: Rows, maker: Maker, folder: str | os.PathLike) -> list[Part]:
  """Return the parts of all rows, after making those that the folder does not have yet.

  All processes of a run call this function together.

  Args:
    rows: the rows of a dataset.
    maker: makes the parts.
    folder: a folder that all processes share. What it holds of other rows or settings is deleted.

  Raises:
    UserError: if the examples of a row cannot be made.
    StoppedError: if a file cannot be written, or a worker process ends, for lack of memory maybe.
    Interrupted: after SIGTERM or SIGINT; finished parts are kept.
  """
  key = _identify(rows, maker)
  own = pathlib.Path(folder) / key
  processes.run_on_process_0('prepare the folder of examples', lambda: _clear(own))
  paths = [own / f'{i:06}.safetensors' for i in range(-(-len(rows) // PART_ROWS))]
  cores = _count_cores()  # by all processes together
  mine = range(jax.process_index(), len(paths), jax.process_count())

  def make() -> None:
    missing = [i for i in mine if not paths[i].exists()]
    _make_missing(rows, maker, paths, missing, cores)

  processes.run_on_all_processes('prepare the examples', make)
  return [map_part(path) for path in paths]


def delete_parts(folder: str | os.PathLike) -> None:
  """Delete the parts in a folder. All processes of a run call this function together.

  Args:
    folder: the folder; it need not exist.
  """
  delete = functools.partial(shutil.rmtree, folder, ignore_errors=True)
  processes.run_on_process_0('delete the files of examples', delete)


def _clear(own: pathlib.Path) -> None:
  """Create the folder of these parts, and delete those of others beside it."""
  make_folder(own)
  for other in own.parent.iterdir():
    if other != own:
      shutil.rmtree(other, ignore_errors=True)


def _identify(rows: Rows, maker: Maker) -> str:
  """Return a digest of all that the parts depend on, 16 hex digits."""
  package = pathlib.Path(__file__).parents[1]
  modules = ('data', 'dialogue')  # their code makes the parts
  code = sorted(
    str(path.relative_to(package)) for name in modules for path in (package / name).rglob('*.py')
  )
  names = 'tokenizers', 'transformers', 'jinja2'
  libraries = [importlib.metadata.version(name) for name in names]
  content = [content_digest(rows.folder), rows.split, len(rows), maker.digest, PART_ROWS, libraries]
  content += [digest_files(package, code), sorted(loaded_plugins().values())]
  return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _count_cores() -> int:
  """Return the number of cores for each process of this host. All processes call it together."""
  count = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
  return max(1, count // processes.count_on_this_host())


def _make_missing(
  rows: Rows, maker: Maker, paths: Sequence[pathlib.Path], missing: Sequence[int], cores: int
) -> None:
  """Make parts and write them, in this process or in workers."""
  work = [(i * PART_ROWS, min((i + 1) * PART_ROWS, len(rows)), paths[i]) for i in missing]
  total, done = sum(end - begin for begin, end, _ in work), 0
  with Progress('examples', 'row', quiet_seconds=_QUIET_SECONDS) as progress:
    tokens = 0

    def report(count: int, size: int) -> None:
      nonlocal done, tokens
      done, tokens = done + count, tokens + size
      progress(done, total, tokens)

    if cores == 1 or total < POOL_ROWS:
      for begin, end, path in work:
        report(end - begin, _make_one(rows, maker, begin, end, path))
    else:
      _run_in_pool(cores, rows, maker, work, report)


Work = Sequence[tuple[int, int, pathlib.Path]]  # first row, end, and the file of each part
Report = Callable[[int, int], None]  # with the numbers of rows and of tokens of a part


def _run_in_pool(cores: int, rows: Rows, maker: Maker, work: Work, report: Report) -> None:
  """Make parts in worker processes.

  Workers are new interpreters (`spawn`): JAX runs threads in this process, which a fork would copy
  in any state. A worker computes nothing on devices.
  """
  pool = concurrent.futures.ProcessPoolExecutor(
    min(cores, len(work)),
    multiprocessing.get_context('spawn'),
    _start_worker,
    (rows, maker, tuple(loaded_plugins())),
  )
  try:
    jobs = {pool.submit(_work, *part): part for part in work}
    for job in concurrent.futures.as_completed(jobs):
      begin, end, _ = jobs[job]
      report(end - begin, job.result())
  except BrokenProcessPool as error:
    interruption.check()  # a signal to all processes ends the workers too
    raise StoppedError(
      'A worker process that makes training examples ended. If memory is short, give this process '
      'fewer cores, for example with taskset. A script of your own must start its work under '
      "`if __name__ == '__main__':`, because workers import it."
    ) from error
  finally:
    pool.shutdown(cancel_futures=True)  # parts that are being made are finished


_shared: list[Any] = []  # of a worker: the rows and the maker


def _start_worker(rows: Rows, maker: Maker, plugins: Sequence[str]) -> None:
  """Prepare a worker, which ends with the process that started it."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
  signal.signal(signal.SIGTERM, signal.SIG_DFL)  # without a message of its own
  load_plugins(plugins)
  _shared[:] = rows, maker
  parent = multiprocessing.parent_process()
  assert parent is not None

  def follow() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=follow, daemon=True).start()


def _work(begin: int, end: int, path: pathlib.Path) -> int:
  """Make a part in a worker."""
  rows, maker = _shared
  return _make_one(rows, maker, begin, end, path)


def _make_one(rows: Rows, maker: Maker, begin: int, end: int, path: pathlib.Path) -> int:
  """Make and write a part, and return the number of its tokens."""
  part = maker.make_part(rows, begin, end)
  save_part(path, part)
  return len(part.segments.values)
