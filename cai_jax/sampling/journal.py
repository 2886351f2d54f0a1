"""The turn journal, which stores every finished turn under a hash of all that determines it."""

import array
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np

from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import make_folder, writing
from cai_jax.sampling.types import Completion, SamplingConfig

# The parts of a line. Indexing a journal reads the keys of a line and does not parse its turns.
_KEYS, _TURNS, _END = b'{"keys": ', b', "turns": ', b']}\n'
_FIELDS = tuple(field.name for field in dataclasses.fields(Completion))


def digest(
  fingerprint: str,
  context: list[int],
  sampling: SamplingConfig,
  stop: tuple[tuple[int, ...], tuple[str, ...]],
  key: bytes,
) -> str:
  """Return the key of a turn: a hex digest of everything that determines its reply.

  If you add a setting to `SamplingConfig`, include it here as well, but only when it is on. The
  keys of existing journals then stay the same.

  Args:
    fingerprint: fingerprint of the model.
    context: token ids that precede the reply.
    sampling: sampling settings.
    stop: all token ids and all texts that end the reply.
    key: the turn's random key.
  """
  settings = [sampling.temperature, sampling.top_k, sampling.top_p, sampling.max_tokens, *stop]
  text = json.dumps([fingerprint, settings, key.hex()])
  tokens = np.array(context, '<i4')  # as JSON, a long context takes four times as long
  return hashlib.sha256(text.encode() + tokens.tobytes()).hexdigest()[:32]


class Journal:
  """An append-only store of completions in a folder, with one file per writing process.

  Each line contains the turns of one chain, so if the process is killed, either all of them are
  stored or none. A line that was cut short is dropped when the journal is opened again. `put`
  passes every line to the operating system before it returns. A killed process therefore loses no
  stored turn, but a machine that crashes may lose those of the last seconds.

  The index takes 20 bytes of host memory per turn. It covers the turns that all processes had
  stored by the last `refresh`, which also runs on opening. `put` does not add to it, because the
  engine looks up each turn once, before sampling it, and chain ids and turn names are unique in a
  run. If a turn were looked up again, it would be sampled again, with the same tokens.

  Args:
    folder: the journal's folder, created if it does not exist.
    process: index of this process, which selects the file that it writes.
  """

  def __init__(self, folder: str | os.PathLike, process: int = 0):
    self._folder = make_folder(folder)
    self._paths: list[pathlib.Path] = []
    self._indexed: list[int] = []  # for each path, the number of bytes that are indexed
    self._latest: tuple[tuple[int, int] | None, dict] = None, {}  # the line that was read last
    # The index, sorted by hash. Keys with equal hashes are compared on disk.
    self._hashes = np.empty(0, np.int64)
    self._files = np.empty(0, np.int32)  # indices into `_paths`
    self._offsets = np.empty(0, np.int64)  # byte offsets of lines
    self._num_unindexed = 0  # turns stored here since the last refresh
    self.refresh()
    own = self._folder / f'turns-{process:05d}.jsonl'
    with writing(own):
      if own in self._paths:
        os.truncate(own, self._indexed[self._paths.index(own)])  # drops a line cut short by a kill
      self._file = open(own, 'ab', buffering=0)

  def __len__(self) -> int:
    return len(self._hashes) + self._num_unindexed

  def get(self, key: str) -> Completion | None:
    """Return the completion that was stored under a key at the last `refresh`, or None.

    Args:
      key: the key of the turn, from `digest`.

    Raises:
      UserError: if the line of the turn is damaged.
    """
    key_hash = hash(key)
    index = int(np.searchsorted(self._hashes, key_hash))
    while index < len(self._hashes) and self._hashes[index] == key_hash:
      line = self._read_line(int(self._files[index]), int(self._offsets[index]))
      if key in line['keys']:
        return Completion(**line['turns'][line['keys'].index(key)])
      index += 1
    return None

  def put(self, turns: list[tuple[str, Completion]]) -> None:
    """Store (key, completion) pairs atomically, in one line.

    Args:
      turns: the pairs of one chain.

    Raises:
      StoppedError: if the disk is full, or the file was deleted.
    """
    keys = json.dumps([key for key, _ in turns]).encode()
    # dataclasses.asdict copies every list item by item, which makes `put` four times as slow.
    values = [{name: getattr(completion, name) for name in _FIELDS} for _, completion in turns]
    line = _KEYS + keys + _TURNS + json.dumps(values).encode() + b'}\n'
    with writing(self._file.name):
      if os.fstat(self._file.fileno()).st_nlink == 0:  # what is written now would be lost
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
      # The next start drops a line that is cut short.
      if self._file.write(line) != len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    self._num_unindexed += len(turns)

  def refresh(self) -> None:
    """Index the lines that any process has written since the last refresh.

    Raises:
      UserError: if a line other than the last of a file is damaged.
    """
    indexed_paths = set(self._paths)
    new = [path for path in sorted(self._folder.glob('turns-*.jsonl')) if path not in indexed_paths]
    self._paths += new
    self._indexed += [0] * len(new)
    parts = [(self._hashes, self._files, self._offsets)]
    for file, path in enumerate(self._paths):
      hashes, offsets = self._index_new_lines(file, path)
      parts.append((hashes, np.full(len(hashes), file, np.int32), offsets))
    self._num_unindexed = 0
    if any(len(hashes) for hashes, _, _ in parts[1:]):
      columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
      order = np.argsort(columns[0], kind='stable')  # of equal keys, `get` finds the earliest
      self._hashes, self._files, self._offsets = (column[order] for column in columns)

  def close(self) -> None:
    """Flush everything to disk and close the file."""
    with writing(self._file.name):
      os.fsync(self._file.fileno())
      self._file.close()

  def _index_new_lines(self, file: int, path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Return key hashes i64[N] and line offsets i64[N] of the turns not indexed yet."""
    hashes, offsets = array.array('q'), array.array('q')
    offset, size = self._indexed[file], path.stat().st_size
    if size > offset:
      with open(path, 'rb', buffering=1 << 20) as lines:
        lines.seek(offset)
        for line in lines:
          # Stop at a line that a kill cut short. By now its process may have truncated it and
          # written beyond it, so lines past the file's earlier size are left for later too.
          if not line.endswith(b'\n') or offset + len(line) > size:
            break
          for key in _parse_keys(line, path, offset):
            hashes.append(hash(key))
            offsets.append(offset)
          offset += len(line)
    self._indexed[file] = offset
    return np.array(hashes, np.int64), np.array(offsets, np.int64)

  def _read_line(self, file: int, offset: int) -> dict[str, Any]:
    """Return keys and turns of a line. The last line is cached: a chain's turns share a line."""
    if self._latest[0] != (file, offset):
      path = self._paths[file]
      with open(path, 'rb') as lines:
        lines.seek(offset)
        text = lines.readline()
      try:
        line = json.loads(text)
        complete = len(line['keys']) == len(line['turns'])
      except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise _damaged(path, offset) from error
      if not complete:
        raise _damaged(path, offset)
      self._latest = (file, offset), line
    return self._latest[1]


def _parse_keys(line: bytes, path: pathlib.Path, offset: int) -> list[str]:
  """Return the keys of a line without parsing its turns, which would take 20 times as long."""
  end = line.find(_TURNS)
  if end < 0 or not line.startswith(_KEYS) or not line.endswith(_END):
    raise _damaged(path, offset)
  try:
    return json.loads(line[len(_KEYS) : end])
  except (ValueError, RecursionError) as error:
    raise _damaged(path, offset) from error


def _damaged(path: pathlib.Path, offset: int) -> UserError:
  """Return the error for a damaged line at a byte offset."""
  number = 1
  with open(path, 'rb') as lines:
    while offset > 0:
      offset -= len(lines.readline())
      number += 1
  return UserError(
    f'{path}, line {number} is not a journal entry, because the file is damaged or was edited. '
    'Delete the line; its turns are then sampled again.'
  )
