"""The turn journal: every finished turn on disk, under a hash of all that determines it."""

import dataclasses
import hashlib
import json
import os
import pathlib

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
  text = json.dumps([fingerprint, context, settings, key.hex()])
  return hashlib.sha256(text.encode()).hexdigest()[:32]


class Journal:
  """Append-only store of completions in a folder, one file for each process that writes.

  A line is a chain's turns: all of them are there, or none is. What earlier runs and other
  processes wrote is read once, at opening. Host memory holds an index of file offsets; texts stay
  on disk. A line that a kill cut short is dropped at the next opening.
  """

  def __init__(self, folder: str | os.PathLike, process: int = 0):
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    self._index: dict[str, tuple[pathlib.Path, int, int]] = {}  # file, offset, place in its line
    own = folder / f'turns-{process:05d}.jsonl'
    for path in sorted(folder.glob('turns-*.jsonl')):
      whole = self._read_index(path)
      if path == own and whole < path.stat().st_size:
        os.truncate(path, whole)
    self._path = own
    self._file = open(own, 'ab')
    self._readers = {}

  def __len__(self) -> int:
    return len(self._index)

  def get(self, key: str) -> Completion | None:
    """The completion under `key`, or None."""
    place = self._index.get(key)
    if place is None:
      return None
    path, offset, number = place
    if path not in self._readers:
      self._readers[path] = open(path, 'rb')
    self._readers[path].seek(offset)
    return Completion(**json.loads(self._readers[path].readline())['turns'][number])

  def put(self, turns: list[tuple[str, Completion]]) -> None:
    """Appends (key, completion) pairs: after a kill all of them are there, or none is."""
    keys = [key for key, _ in turns]
    self._index |= {key: (self._path, self._file.tell(), i) for i, key in enumerate(keys)}
    line = {'keys': keys, 'turns': [dataclasses.asdict(completion) for _, completion in turns]}
    self._file.write(json.dumps(line).encode() + b'\n')
    self._file.flush()

  def close(self) -> None:
    """Writes everything to disk and closes the files."""
    os.fsync(self._file.fileno())
    for file in (self._file, *self._readers.values()):
      file.close()

  def _read_index(self, path: pathlib.Path) -> int:
    """Indexes the whole lines of a file; their length in bytes.

    Raises:
      ValueError: if a line other than the last cannot be read.
    """
    offset = 0
    with open(path, 'rb') as file:
      for number, line in enumerate(file, 1):
        if not line.endswith(b'\n'):
          break  # the write that a kill cut short
        try:
          keys = json.loads(line)['keys']
        except (ValueError, KeyError, TypeError) as error:
          raise ValueError(
            f'{path}, line {number}: not a journal entry. The file was edited or is damaged; '
            'delete that line (its turns are sampled again) or the file.'
          ) from error
        self._index |= {key: (path, offset, i) for i, key in enumerate(keys)}
        offset += len(line)
    return offset
