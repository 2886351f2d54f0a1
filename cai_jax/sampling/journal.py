"""The turn journal: every finished turn on disk, under a hash of all that determines it."""

import array
import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np

from cai_jax.runtime.errors import UserError
from cai_jax.sampling.types import Completion, SamplingConfig


def digest(
  fingerprint: str,
  context: list[int],
  sampling: SamplingConfig,
  stop: tuple[tuple[int, ...], tuple[str, ...]],
  key: bytes,
) -> str:
  """Hex digest of what determines a sampled reply.

  Args:
    fingerprint: of the model.
    context: token ids before the reply.
    sampling: its settings.
    stop: all token ids and texts that end it.
    key: the turn's random key.
  """
  settings = [sampling.temperature, sampling.top_k, sampling.top_p, sampling.max_tokens, *stop]
  text = json.dumps([fingerprint, settings, key.hex()])
  tokens = np.array(context, '<i4')  # as text, a long context costs four times as much
  return hashlib.sha256(text.encode() + tokens.tobytes()).hexdigest()[:32]


# How a line begins and goes on: opening a journal reads the keys and leaves the turns unparsed.
_KEYS, _TURNS, _END = b'{"keys": ', b', "turns": ', b']}\n'
_FIELDS = tuple(field.name for field in dataclasses.fields(Completion))


class Journal:
  """Append-only store of completions in a folder, one file for each process that writes.

  A line is a chain's turns: all of them are there, or none is. A line that a kill cut short is
  dropped at the next opening. Every line is handed to the operating system before `put` returns,
  so that a killed process loses nothing that it put; a machine that goes down may lose the last
  seconds.

  Host memory holds 20 bytes for each turn that was on disk at opening, or at the last `refresh`,
  of whichever process. It does not grow with what is put: the engine asks for a turn before it is
  sampled, and ids of chains and names of turns are not given twice in a run, so a run never asks
  for what it put itself (if it did, the turn would be sampled again, to the same tokens). `get`
  finds what was put here after `refresh`, with which a run begins.
  """

  def __init__(self, folder: str | os.PathLike, process: int = 0):
    self._folder = pathlib.Path(folder)
    self._folder.mkdir(parents=True, exist_ok=True)
    self._paths: list[pathlib.Path] = []
    self._read: list[int] = []  # bytes of each that are indexed
    self._latest: tuple[tuple[int, int] | None, dict] = None, {}  # the line that was read last
    # The index, sorted by hash. Two turns of one hash are told apart by their keys on disk.
    self._hashes = np.empty(0, np.int64)
    self._files = np.empty(0, np.int32)  # places in `_paths`
    self._offsets = np.empty(0, np.int64)  # bytes, of the line
    self._put = 0  # turns put since they were last indexed
    self.refresh()
    own = self._folder / f'turns-{process:05d}.jsonl'
    if own in self._paths:
      os.truncate(own, self._read[self._paths.index(own)])  # a line that a kill cut short
    self._file = open(own, 'ab', buffering=0)

  def __len__(self) -> int:
    return len(self._hashes) + self._put

  def get(self, key: str) -> Completion | None:
    """The completion under `key` that was on disk at the last `refresh`, or None.

    Raises:
      ValueError: if its line is damaged.
    """
    wanted = hash(key)
    at = int(np.searchsorted(self._hashes, wanted))
    while at < len(self._hashes) and self._hashes[at] == wanted:
      line = self._line(int(self._files[at]), int(self._offsets[at]))
      if key in line['keys']:
        return Completion(**line['turns'][line['keys'].index(key)])
      at += 1
    return None

  def put(self, turns: list[tuple[str, Completion]]) -> None:
    """Appends (key, completion) pairs: after a kill all of them are there, or none is.

    Raises:
      OSError: if the disk does not take all of it.
    """
    keys = json.dumps([key for key, _ in turns]).encode()
    # Not dataclasses.asdict, which copies every list, item by item: four times as slow in all.
    values = [{name: getattr(completion, name) for name in _FIELDS} for _, completion in turns]
    line = _KEYS + keys + _TURNS + json.dumps(values).encode() + b'}\n'
    written = self._file.write(line)
    if written != len(line):
      raise OSError(
        f'{self._file.name}: {written} of {len(line)} bytes were written; the disk is full.'
      )
    self._put += len(turns)

  def refresh(self) -> None:
    """Indexes the lines that any process has written since opening or the last refresh.

    Raises:
      ValueError: if a line other than a file's last cannot be read.
    """
    known = set(self._paths)
    new = [path for path in sorted(self._folder.glob('turns-*.jsonl')) if path not in known]
    self._paths += new
    self._read += [0] * len(new)
    parts = [(self._hashes, self._files, self._offsets)]
    for file, path in enumerate(self._paths):
      hashes, offsets = self._read_new(file, path)
      parts.append((hashes, np.full(len(hashes), file, np.int32), offsets))
    self._put = 0
    if any(len(hashes) for hashes, _, _ in parts[1:]):
      columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
      order = np.argsort(columns[0], kind='stable')  # of equal keys the one read first is found
      self._hashes, self._files, self._offsets = (column[order] for column in columns)

  def close(self) -> None:
    """Writes everything to disk and closes the file."""
    os.fsync(self._file.fileno())
    self._file.close()

  def _read_new(self, file: int, path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """(hashes i64[N], offsets i64[N]) of the turns in the lines of a file not yet indexed."""
    hashes, offsets = array.array('q'), array.array('q')
    offset, size = self._read[file], path.stat().st_size
    if size > offset:
      with open(path, 'rb', buffering=1 << 20) as lines:
        lines.seek(offset)
        for line in lines:
          # A line cut short by a kill. Its process may be cutting it off and writing on by now.
          if not line.endswith(b'\n') or offset + len(line) > size:
            break
          for key in _keys(line, path, offset):
            hashes.append(hash(key))
            offsets.append(offset)
          offset += len(line)
    self._read[file] = offset
    return np.array(hashes, np.int64), np.array(offsets, np.int64)

  def _line(self, file: int, offset: int) -> dict[str, Any]:
    """The keys and turns of a line. The last one is kept: a chain asks for its turns in a row."""
    if self._latest[0] != (file, offset):
      path = self._paths[file]
      with open(path, 'rb') as lines:
        lines.seek(offset)
        text = lines.readline()
      try:
        line = json.loads(text)
        if len(line['keys']) != len(line['turns']):
          raise UserError('as many turns as keys are expected.')
      except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, offset) from error
      self._latest = (file, offset), line
    return self._latest[1]


def _keys(line: bytes, path: pathlib.Path, offset: int) -> list[str]:
  """The keys of a line; its turns are not looked at, as they take 20 times as long."""
  end = line.find(_TURNS)
  try:
    if end < 0 or not line.startswith(_KEYS) or not line.endswith(_END):
      raise UserError('not the form of a line.')
    return json.loads(line[len(_KEYS) : end])
  except ValueError as error:
    raise _damaged(path, offset) from error


def _damaged(path: pathlib.Path, offset: int) -> ValueError:
  number = 1
  with open(path, 'rb') as lines:
    while offset > 0:
      offset -= len(lines.readline())
      number += 1
  return ValueError(
    f'{path}, line {number}: not a journal entry. The file was edited or is damaged; '
    'delete that line (its turns are sampled again) or the file.'
  )
