"""The manifest of a run: `manifest.json` in its folder, with the settings and results of stages."""

import contextlib
import datetime
import importlib.metadata
import os
import pathlib
import platform
import resource
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
from etils import epath

from cai_jax.runtime.errors import StoppedError, UserError
from cai_jax.runtime.files import read_json, write_json
from cai_jax.runtime.settings import changed_settings, flatten

# Version of a run's folder and config. Raise it when an older program would misread a newer folder,
# and let `_migrate` bring older folders up to date.
# 1: everything before versions were recorded. 2: adds `plugins`, `data.d_cai`, `model.aligned`.
VERSION = 2

PACKAGES = (
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'grain',
  'array_record',
  'tensorflow-datasets',
  'transformers',
  'tokenizers',
  'numpy',
)

_OBJECTS = ('settings', 'model', 'base', 'aligned', 'environment', 'paths')  # fields of a stage
# Fields of a stage, or of its parts 'base' and 'aligned', that are numbers.
_NUMBERS = (
  *('seconds', 'peak_memory_bytes', 'turns', 'replayed_turns'),
  *('tokens', 'sampled_tokens'),
)


class Manifest:
  """The manifest of a run's folder, which is written when a stage begins or ends.

  An existing manifest is read first. If an older version wrote it, it is migrated in memory, and on
  disk with the next write.

  Args:
    workdir: the run's folder.
    writes: whether this process writes the file; in a run, only process 0 does.

  Attributes:
    content: the manifest as JSON types.

  Raises:
    UserError: if the file is damaged, or a newer version of cai_jax wrote the folder.
  """

  def __init__(self, workdir: str | os.PathLike, writes: bool = True):
    self._path = epath.Path(workdir) / 'manifest.json'
    self._writes = writes
    self.content: dict[str, Any] = {'version': VERSION, 'started': _now(), 'stages': {}}
    if self._path.exists():
      self.content = read_manifest(self._path)
    self.content |= {
      'versions': _package_versions(),
      'devices': _devices(),
      'git_commit': git_commit(),
    }

  def done(self, stage: str) -> bool:
    """Return whether a stage has finished."""
    return 'finished' in self.content['stages'].get(stage, {})

  def check(
    self,
    stage: str,
    settings: Mapping[str, Any],
    defaults: Mapping[str, Any] = MappingProxyType({}),
    free_when_done: Sequence[str] = (),
  ) -> None:
    """Check that a stage, if it has begun here, began with the same settings.

    Args:
      stage: name of the stage.
      settings: everything that the stage's result depends on, as nested dicts.
      defaults: the default of each field, by dotted name. If the recorded settings lack a field, an
        older version wrote them, and the field counts as having its default.
      free_when_done: dotted names of settings that may change once the stage is done.

    Raises:
      UserError: if the settings differ; the message names the fields.
    """
    recorded = self.content['stages'].get(stage, {}).get('settings')
    if recorded is None:
      return
    changes = changed_settings(flatten(recorded), flatten(dict(settings)), defaults)
    contents = recorded.get('contents', {}), settings.get('contents', {})
    changes = _without_known_contents(changes, *contents)
    if self.done(stage):
      changes = {name: values for name, values in changes.items() if name not in free_when_done}
    if changes:
      listed = [
        f'{name.replace("contents.", "what is in ")}: {old!r} → {new!r}'
        for name, (old, new) in changes.items()
      ]
      raise UserError(
        f'{self._path.parent} holds stage {stage!r} of a run with other settings '
        f'({"; ".join(listed[:8])}). Use another workdir. To reuse all turns that stay the same, '
        'copy journal/ into it.'
      )

  @contextlib.contextmanager
  def stage(self, stage: str, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Record that a stage begins, and that it has finished if the block succeeds.

    A UserError other than StoppedError means that the stage did nothing. If the stage had not begun
    before, the manifest then drops its entry, so that you can try other settings.

    Args:
      stage: name of the stage.
      settings: everything that the stage's result depends on, as nested dicts.

    Yields:
      The stage's entry in the manifest, for the block to add its results.
    """
    had_begun = stage in self.content['stages']
    entry = self.content['stages'].setdefault(stage, {})
    entry['settings'] = settings
    entry['git_commit'] = self.content['git_commit']
    # A later stage, or a new report, may run on another machine.
    entry['environment'] = {
      'cai_jax': program_version(),
      'packages': self.content['versions'],
      'devices': self.content['devices'],
    }
    self._write()
    start = time.perf_counter()
    try:
      yield entry
    except StoppedError:
      raise
    except UserError:
      if not had_begun:
        del self.content['stages'][stage]
        self._write()
      raise
    entry['seconds'] = time.perf_counter() - start  # of this attempt, if an earlier one was killed
    entry['peak_memory_bytes'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    entry['finished'] = self.content['finished'] = _now()
    self._write()

  def _write(self) -> None:
    if self._writes:
      write_json(self._path, self.content)


def _without_known_contents(
  changes: Mapping[str, Any], saved: Mapping[str, Any], current: Mapping[str, Any]
) -> dict[str, Any]:
  """Drop the changes of names behind which the same content is, and of contents not known before.

  Args:
    changes: changed settings by dotted name; those that begin with 'contents.' are digests.
    saved: digests of the earlier start, by the setting that names their model or file.
    current: digests of this start; what is gone is left out.
  """
  known = saved.keys() & current.keys()
  return {
    name: values
    for name, values in changes.items()
    if (
      any(name.startswith(f'contents.{field}.') for field in known)
      if name.startswith('contents')
      else name not in known or saved[name] != current[name]
    )
  }


def read_manifest(path: str | os.PathLike) -> dict[str, Any]:
  """Return a manifest in the form of the current version.

  Args:
    path: the file `manifest.json`.

  Raises:
    UserError: if the file is damaged, or a newer version of cai_jax wrote it.
  """
  return _migrate(read_json(path), path)


def check_version(version: Any, source: object) -> None:
  """Check that this version of cai_jax can read a folder or config.

  Args:
    version: version of the folder or config, as its file gives it.
    source: the folder or config, for the error message.

  Raises:
    UserError: if the version is not in 1..VERSION.
  """
  if not isinstance(version, int) or not 1 <= version <= VERSION:
    raise UserError(
      f'{source} has version {version}, and this cai_jax reads versions 1 to {VERSION}. Install '
      'the cai_jax that wrote it, or use another workdir.'
    )


def _migrate(content: dict[str, Any], path: str | os.PathLike) -> dict[str, Any]:
  """Return a manifest in the form of the current version.

  Version 1 has no `version`. What version 2 adds to the settings is filled in by `Manifest.check`.
  """
  check_version(content.get('version', 1), path)
  stages = content.get('stages')
  if not isinstance(stages, dict) or not all(map(_is_stage, stages.values())):
    raise UserError(
      f'{path} does not describe the stages of a run, so it is damaged. Restore it, or use another '
      'workdir.'
    )
  return content | {'version': VERSION}


def _is_stage(entry: Any) -> bool:
  """Return whether an entry of a manifest can describe a stage: what is read later has its type."""
  if not isinstance(entry, dict):
    return False
  objects = [entry.get(name, {}) for name in _OBJECTS]
  if not all(isinstance(value, dict) for value in objects):
    return False
  contents = objects[0].get('contents', {})
  if not isinstance(contents, dict) or not all(isinstance(v, dict) for v in contents.values()):
    return False
  if 'finished' in entry and not {'seconds', 'peak_memory_bytes'} <= entry.keys():
    return False
  values = [part[name] for part in (entry, *objects[2:4]) for name in _NUMBERS if name in part]
  return all(isinstance(value, int | float) for value in values)


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')


def _package_versions() -> dict[str, str]:
  versions = {name: importlib.metadata.version(name) for name in PACKAGES}
  return {'python': platform.python_version()} | versions


def program_version() -> str:
  """Return the version of cai_jax; '' for a source tree that is not installed."""
  try:
    return importlib.metadata.version('cai_jax')
  except importlib.metadata.PackageNotFoundError:
    return ''


def _devices() -> dict[str, Any]:
  """Describe the devices: two runs give the same bytes only on equal devices."""
  devices = jax.devices()
  return {
    'host': platform.node(),
    'processes': jax.process_count(),
    'count': len(devices),
    'kind': devices[0].device_kind,
    'platform': devices[0].platform,
  }


def git_commit() -> str:
  """Return the commit of the source tree, with '+' for uncommitted changes; '' without git."""
  git = ['git', '-C', str(pathlib.Path(__file__).parent)]
  try:
    commit = subprocess.run([*git, 'rev-parse', 'HEAD'], capture_output=True, text=True, check=True)
    changes = subprocess.run(
      [*git, 'status', '--porcelain', '-uno'], capture_output=True, text=True
    )
  except (OSError, subprocess.CalledProcessError):
    return ''
  return commit.stdout.strip() + ('+' if changes.stdout.strip() else '')
