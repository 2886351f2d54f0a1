"""What a run was and how far it came: `manifest.json` in its folder."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import jax

from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import write_json
from cai_jax.runtime.settings import flatten

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


class Manifest:
  """The manifest of a folder, read if it is there. Only a process that `writes` changes it."""

  def __init__(self, workdir: str | os.PathLike, writes: bool = True):
    self._path = pathlib.Path(workdir) / 'manifest.json'
    self._writes = writes
    if self._path.exists():
      self.content = json.loads(self._path.read_text(encoding='utf-8'))
    else:
      self.content = {'started': _now(), 'stages': {}}
    self.content |= {
      'versions': _versions(),
      'devices': _devices(),
      'git_commit': _git_commit(),
    }

  def done(self, stage: str) -> bool:
    """Whether a stage has ended."""
    return 'finished' in self.content['stages'].get(stage, {})

  def check(self, stage: str, settings: dict[str, Any]) -> None:
    """Compares the settings of a stage with those that it was begun or done with here.

    Raises:
      ValueError: if they differ, naming what does.
    """
    before = self.content['stages'].get(stage, {}).get('settings')
    if before is None:
      return
    old, new = flatten(before), flatten(json.loads(json.dumps(settings)))
    changed = [
      f'{name}: {old.get(name)!r} → {new.get(name)!r}'
      for name in sorted({*old, *new})
      if old.get(name) != new.get(name)
    ]
    if changed:
      raise UserError(
        f'{self._path.parent} holds stage {stage!r} of a run with other settings '
        f'({"; ".join(changed[:8])}). Use another workdir; copy journal/ into it, and no turn that '
        'stays the same is sampled again.'
      )

  @contextlib.contextmanager
  def stage(self, stage: str, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Marks a stage as begun, and as done if the block ends well.

    What the block puts into the dict it is given stands in the manifest.
    """
    begun = stage in self.content['stages']
    entry = self.content['stages'].setdefault(stage, {})
    entry['settings'] = settings
    entry['git_commit'] = self.content['git_commit']
    self._write()
    start = time.perf_counter()
    try:
      yield entry
    except ValueError:  # refused before it did anything: its settings bind nobody
      if not begun:
        del self.content['stages'][stage]
        self._write()
      raise
    entry['seconds'] = time.perf_counter() - start  # of this start, where an earlier one was cut
    entry['peak_memory_bytes'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    entry['finished'] = self.content['finished'] = _now()
    self._write()

  def _write(self) -> None:
    if self._writes:
      write_json(self._path, self.content)


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')


def _versions() -> dict[str, str]:
  found = {'python': platform.python_version()}
  for name in PACKAGES:
    found[name] = importlib.metadata.version(name)
  return found


def _devices() -> dict[str, Any]:
  """What the run computes on: equal bytes are promised on equal devices only."""
  devices = jax.devices()
  return {
    'host': platform.node(),
    'processes': jax.process_count(),
    'count': len(devices),
    'kind': devices[0].device_kind,
    'platform': devices[0].platform,
  }


def _git_commit() -> str:
  """The commit of the source tree, '' outside of one; '+' marks changes that are not committed."""
  folder = pathlib.Path(__file__).parent
  git = ['git', '-C', str(folder)]
  try:
    commit = subprocess.run([*git, 'rev-parse', 'HEAD'], capture_output=True, text=True, check=True)
    changes = subprocess.run(
      [*git, 'status', '--porcelain', '-uno'], capture_output=True, text=True
    )
  except (OSError, subprocess.CalledProcessError):
    return ''
  return commit.stdout.strip() + ('+' if changes.stdout.strip() else '')
