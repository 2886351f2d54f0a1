"""Which files a folder and its store have in common: their sizes, times and versions."""

import dataclasses
import json
import os
import pathlib
import re
from typing import NamedTuple

from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import parse_json

FOLDER = '.cai_jax'  # what the mirror itself writes, in the folder and in the store
INDEX = f'{FOLDER}/index.json'

# Orbax renames a step's folder when it is complete, and this file is then in it. A store renames
# nothing, so the mirror writes the file last and deletes it first. Where Orbax itself writes to a
# store (`direct.py`), it writes the other file last.
STEP_MARKER = '_CHECKPOINT_METADATA'
_COMMITTED = 'commit_success.txt'
_STEP = re.compile(r'(?:^|.*/)checkpoints/\d+(?=/)')
_UNFINISHED_STEP = '.orbax-checkpoint-tmp'

_RUN = re.compile(r'runs/[^/]+/')  # the folder of a run in that of an experiment


class FileState(NamedTuple):
  """A file as it was when folder and store had it in common.

  Attributes:
    size: number of bytes.
    mtime_ns: when the local file was modified, in nanoseconds.
    version: version of its object.
  """

  size: int
  mtime_ns: int
  version: str


@dataclasses.dataclass
class Index:
  """The files of a store, as the job that wrote last left them.

  Attributes:
    job: id of that job; '' before the first.
    files: state of each file, by name.
  """

  job: str = ''
  files: dict[str, FileState] = dataclasses.field(default_factory=dict)

  def to_bytes(self) -> bytes:
    """Return the index as JSON."""
    return json.dumps({'job': self.job, 'files': self.files}, indent=0).encode()


def parse_index(content: bytes, place: object) -> Index:
  """Return an index that `Index.to_bytes` wrote.

  Args:
    content: the JSON text.
    place: where it was read, for the error message.

  Raises:
    UserError: if it is damaged.
  """
  try:
    value = parse_json(content)
    files = {str(name): FileState(*state) for name, state in value['files'].items()}
    return Index(str(value['job']), files)
  except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
    raise UserError(
      f'{place} is damaged: {error}. Delete it; the next start then compares all files anew.'
    ) from error


def scan(folder: pathlib.Path) -> dict[str, os.stat_result]:
  """Return the files of a folder that a store gets, by name with slashes.

  Hidden files are temporary or belong to this machine. Symbolic links are left out.
  """
  found: dict[str, os.stat_result] = {}
  pending = ['']
  while pending:
    inner = pending.pop()
    try:
      entries = list(os.scandir(folder / inner))
    except FileNotFoundError:  # a checkpoint that has just been deleted or renamed
      continue
    for entry in entries:
      name = f'{inner}/{entry.name}' if inner else entry.name
      if is_left_out(entry.name):
        continue
      if entry.is_dir(follow_symlinks=False):
        pending.append(name)
      elif entry.is_file(follow_symlinks=False):
        try:
          found[name] = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
          continue
  return found


def times(stat: os.stat_result) -> tuple[int, int]:
  """Return the size of a file and its time, which change when it is written."""
  return stat.st_size, stat.st_mtime_ns


def is_same(stat: os.stat_result, state: FileState | None) -> bool:
  """Return whether a file is as it was; an object that changed in the store has another version."""
  return state is not None and times(stat) == (state.size, state.mtime_ns)


def is_left_out(name: str) -> bool:
  """Return whether a file stays where it is, because a part of its name is hidden or unfinished."""
  return any(part.startswith('.') or _UNFINISHED_STEP in part for part in name.split('/'))


def is_record(name: str) -> bool:
  """Return whether a file records what happened, and must be in the store before its results.

  These are the journal and the logs, and the costs of a shard, which are written before the shard.
  """
  return name.endswith('.jsonl') or _name_in_run(name).startswith('costs/')


def is_claim(name: str) -> bool:
  """Return whether a file describes others, so that these must be in the store before it.

  Every other JSON file counts as such: the manifest, a dataset's metadata and a model's config.
  """
  return name.endswith(('.json', STEP_MARKER)) and not is_record(name)


def claim_order(name: str, stat: os.stat_result | None = None) -> tuple[int, int, str]:
  """Return a key that sorts claims as they are written: those last that say most.

  These are the manifests of runs and the results of experiments. A run of an experiment may start
  from a model that another run has trained, so manifests are written in the order of their times.

  Args:
    name: name of the file.
    stat: the file, which has its time; None for one that is to be deleted.
  """
  depth = name.count('/')
  if name.endswith(STEP_MARKER):
    return 1, -depth, name
  if _name_in_run(name) == 'manifest.json':
    return 2, stat.st_mtime_ns if stat else 0, name
  if depth == 1 and name.endswith('/results.json'):
    return 3, 0, name
  return 0, -depth, name


def _name_in_run(name: str) -> str:
  """Return the name of a file in the folder of its run, which may be one of an experiment."""
  return _RUN.sub('', name, count=1) if _RUN.match(name) else name


def step_folder(name: str) -> str:
  """Return the folder of the checkpoint that a file belongs to; '' if it belongs to none."""
  match = _STEP.match(name)
  return match[0] if match else ''


def unfinished(names: set[str]) -> set[str]:
  """Return the names of files in checkpoints that are not complete.

  Args:
    names: names of all files.
  """
  steps = {step for name in names if (step := step_folder(name))}
  ends = STEP_MARKER, _COMMITTED
  broken = {step for step in steps if any(f'{step}/{end}' not in names for end in ends)}
  return {name for name in names if step_folder(name) in broken}
