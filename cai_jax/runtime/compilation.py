"""Keep compiled programs on disk, so that a later run loads them instead of compiling them again.

JAX has such a cache, but it is off unless a program turns it on. Here are the settings under which
cai_jax turns it on, and a count of what was compiled and what was loaded.

JAX names a program by a hash of its code, the versions and flags of the compiler, and the device.
On a CPU that includes its model and its features, so machines that differ can share a folder.
Results do not depend on the cache: it returns what the compiler wrote.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import secrets
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import filelock
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache

from cai_jax.runtime import processes
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import cache_folder
from cai_jax.runtime.settings import setting
from cai_jax.runtime.terminal import say

VARIABLE = 'JAX_COMPILATION_CACHE_DIR'
LOCK_SECONDS = 10.0  # JAX waits as long for the lock of its cache

# Even the smallest program is loaded in 1 to 4 ms and compiled in 10 or more. So JAX's minima,
# below which it keeps no program, are off.
_MINIMA = {
  'jax_persistent_cache_min_compile_time_secs': 0.0,
  'jax_persistent_cache_min_entry_size_bytes': -1,
}
_FOLDER, _SIZE = 'jax_compilation_cache_dir', 'jax_compilation_cache_max_size'
_UNLIMITED = 2**62  # bytes; -1 would turn off the files from which later runs see a program's age


# Measured on an H100 (experiments/RESULTS.md, 2026-11-27). Autotuning times several kernels for
# each product while a program compiles. It took most of the 63 s in which `evaluate` compiled, and
# its choice, and with it the rounding, differed from one compilation to the next. Merged products
# copy their weights at every call. Products of cuBLAS were as fast as Triton's or faster.
_GPU_OPTIONS = {
  'xla_gpu_autotune_level': 0,
  'xla_gpu_dot_merger_threshold_mb': 0,
  'xla_gpu_enable_triton_gemm': False,
}


def xla_options(platform: str) -> dict[str, bool | int] | None:
  """Return the options with which programs are compiled for a platform; None for XLA's own.

  Args:
    platform: such as 'cpu', 'gpu' or 'tpu'.
  """
  return dict(_GPU_OPTIONS) if platform == 'gpu' else None


@functools.cache
def jit_on(platform: str, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
  """Return a jitted function, compiled with the options of a platform.

  Args:
    platform: of the devices that it will run on.
    function: the function.
    **options: of `jax.jit`, each hashable.
  """
  return jax.jit(function, compiler_options=xla_options(platform), **options)


@dataclasses.dataclass(frozen=True)
class CompilationConfig:
  """Where compiled programs are kept. No result depends on it.

  Raises:
    UserError: if the size is not positive.
  """

  cache: str = setting(
    'auto',
    "Folder for the compiled programs of all runs. 'auto' is cai_jax/programs in the user's cache "
    "directory, which is $XDG_CACHE_HOME or ~/.cache. '' keeps none. JAX's own environment "
    f'variable {VARIABLE} comes first. Programs are code: choose no folder that others can write '
    'to.',
    added=True,
    path=True,
    copied=False,
  )
  cache_gib: float = setting(
    1.0,
    'Largest size of that folder, in GiB. The programs that were not used for longest are deleted.',
    added=True,
  )

  def __post_init__(self) -> None:
    if not self.cache_gib > 0:
      raise UserError(
        f'compilation.cache_gib={self.cache_gib} must be positive. To keep no programs, set '
        "compilation.cache=''."
      )

  @property
  def folder(self) -> pathlib.Path | None:
    """The folder, or None if no programs are kept."""
    if self.cache != 'auto':
      return pathlib.Path(self.cache) if self.cache else None
    return cache_folder('programs')


@dataclasses.dataclass(frozen=True)
class Counts:
  """Programs since some moment.

  Attributes:
    compiled: programs that were compiled.
    loaded: programs that came from the cache.
    seconds: time for both, summed over threads.
  """

  compiled: int = 0
  loaded: int = 0
  seconds: float = 0.0

  def since(self, earlier: 'Counts') -> 'Counts':
    """Return the counts without those of an earlier moment."""
    return Counts(
      self.compiled - earlier.compiled, self.loaded - earlier.loaded, self.seconds - earlier.seconds
    )

  def describe(self) -> str:
    """Return the counts as text, such as '3 programs compiled and 2 loaded in 4.1 s'."""
    if not self.compiled + self.loaded:
      return 'no program compiled'
    some = 'program' if self.compiled == 1 else 'programs'
    return f'{self.compiled} {some} compiled and {self.loaded} loaded in {self.seconds:.1f} s'


class _Listener:
  """Counts the programs of this process from the events that JAX reports."""

  def __init__(self) -> None:
    self._programs, self._loaded, self._seconds = 0, 0, 0.0
    jax.monitoring.register_event_listener(self._add_event)
    jax.monitoring.register_event_duration_secs_listener(self._add_duration)

  def _add_event(self, event: str, **_: str | int) -> None:
    self._loaded += event == '/jax/compilation_cache/cache_hits'

  def _add_duration(self, event: str, duration_secs: float, **_: str | int) -> None:
    if event == '/jax/core/compile/backend_compile_duration':  # also of a program that is loaded
      self._programs, self._seconds = self._programs + 1, self._seconds + duration_secs

  def counts(self) -> Counts:
    return Counts(self._programs - self._loaded, self._loaded, self._seconds)


_LISTENER = _Listener()


def counts() -> Counts:
  """Return the programs that this process has compiled and loaded so far."""
  return _LISTENER.counts()


def environment(folder: str | os.PathLike) -> dict[str, str]:
  """Return the environment variables with which a process keeps its programs in a folder.

  Args:
    folder: the folder; its size is not limited.
  """
  values = {_FOLDER: os.fspath(folder), **_MINIMA}
  return {name.upper(): str(value) for name, value in values.items()}


def keep_programs(folder: str | os.PathLike, most_bytes: int = -1) -> dict[str, object]:
  """Make JAX keep the programs of this process in a folder.

  Args:
    folder: the folder.
    most_bytes: largest size of the folder; -1 sets no limit.

  Returns:
    The former values of the settings of JAX that have changed.
  """
  # A variable in the environment is a decision of the user.
  values: dict[str, object] = {
    name: value for name, value in _MINIMA.items() if name.upper() not in os.environ
  }
  values |= {_FOLDER: os.fspath(folder), _SIZE: most_bytes}
  former = {name: getattr(jax.config, name) for name in values}
  _set(values)
  return former


def _set(values: dict[str, object]) -> None:
  """Change settings of JAX's cache."""
  for name, value in values.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()  # JAX opens the folder once and ignores later settings


@contextlib.contextmanager
def kept_programs(config: CompilationConfig, log: Callable[[str], None] = say) -> Iterator[None]:
  """Keep the programs of the block in the configured folder, and then restore JAX's settings.

  If the folder cannot be used, this says so and the block runs without. All processes of a run call
  this together.

  Args:
    config: the folder and its size.
    log: called with a line that says where the programs are.
  """
  folder, line = _choose(config)
  if jax.process_count() > 1 and not _is_shared(folder) and folder is not None:
    line = (
      f'compiled programs: not kept, because not all processes of this run use {folder}. Set '
      'compilation.cache to a folder that they share.'
    )
    folder = None
  log(line)
  if folder is None:
    yield
    return
  # XLA's autotuning waits for all processes of a run, so no process may miss a program that another
  # one has just loaded, and nothing is deleted while they run.
  former = keep_programs(
    folder, int(config.cache_gib * 2**30) if jax.process_count() == 1 else _UNLIMITED
  )
  try:
    yield
  finally:
    _set(former)


def _choose(config: CompilationConfig) -> tuple[pathlib.Path | None, str]:
  """Return the folder to use, or None for the setting that JAX has, and a line that says why."""
  folder = config.folder
  if not getattr(jax.config, 'jax_enable_compilation_cache'):  # noqa: B009, mypy does not know it
    return None, 'compiled programs: not kept (JAX_ENABLE_COMPILATION_CACHE)'
  if own := getattr(jax.config, _FOLDER):
    return None, f'compiled programs: in {own} ({VARIABLE})'
  if folder is None:
    return None, "compiled programs: not kept (compilation.cache='')"
  try:
    count = _open(folder)
  except (OSError, NotImplementedError) as error:  # the latter: no locks on this file system
    return None, (
      f'compiled programs: not kept, because {folder} cannot be used ({error}). Set '
      'compilation.cache to another folder.'
    )
  return folder, f'compiled programs: {count} of earlier runs in {folder}'


def _is_shared(folder: pathlib.Path | None) -> bool:
  """Return whether all processes of the run use a folder and see the same files in it."""
  first = jax.process_index() == 0
  number = int(multihost_utils.broadcast_one_to_all(np.int32(secrets.randbelow(2**31))))
  mark = folder / f'.run-{number}' if folder else None
  if first and mark:
    mark.touch()
  processes.barrier('mark the folder of compiled programs')
  sees = mark is not None and mark.exists()
  shared = bool(np.all(multihost_utils.process_allgather(np.array(sees))))
  if first and mark:
    mark.unlink(missing_ok=True)
  return shared


def _open(folder: pathlib.Path) -> int:
  """Create the folder, delete what a killed process left in it, and return its number of programs.

  JAX writes NAME-cache and then NAME-atime, under a lock. If it was killed in between, the program
  may be incomplete, and JAX 0.10 fails to write any other one.

  Raises:
    OSError: if the folder cannot be written to, or another process keeps it locked.
  """
  folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # only this user may put code here
  with tempfile.TemporaryFile(dir=folder) as probe:
    probe.write(b'probe')
  with filelock.FileLock(folder / '.lockfile', timeout=LOCK_SECONDS):  # JAX's name for it
    names = {entry.name for entry in os.scandir(folder)}
    programs = {name.removesuffix('-cache') for name in names if name.endswith('-cache')}
    unfinished = {name for name in programs if f'{name}-atime' not in names}
    for name in unfinished:
      (folder / f'{name}-cache').unlink(missing_ok=True)
  return len(programs - unfinished)
