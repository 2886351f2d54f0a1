"""The turn journal: every finished turn on disk, under a hash of all that determines it."""

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

  What earlier runs and other processes wrote is read once, at opening. Host memory holds an index
  of file offsets; texts stay on disk. A line that a kill cut short is dropped at the next opening.
  """

  def __init__(self, folder: str | os.PathLike, process: int = 0):
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    self._index: dict[str, tuple[pathlib.Path, int]] = {}
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
    path, offset = place
    if path not in self._readers:
      self._readers[path] = open(path, 'rb')
    self._readers[path].seek(offset)
    row = json.loads(self._readers[path].readline())
    return Completion(row['tokens'], row['text'], row['logprobs'], row['finish_reason'])

  def put(self, turns: list[tuple[str, Completion]]) -> None:
    """Appends (key, completion) pairs in one write, so that they are all there or none is."""
    lines, offset = [], self._file.tell()
    for key, completion in turns:
      line = json.dumps(
        {
          'key': key,
          'text': completion.text,
          'finish_reason': completion.finish_reason,
          'tokens': completion.tokens,
          'logprobs': completion.logprobs,
        }
      ).encode()
      self._index[key] = (self._path, offset)
      lines.append(line + b'\n')
      offset += len(lines[-1])
    self._file.write(b''.join(lines))
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
          self._index[json.loads(line)['key']] = (path, offset)
        except (ValueError, KeyError) as error:
          raise ValueError(
            f'{path}, line {number}: not a journal entry. The file was edited or is damaged; '
            'delete that line (its turn is sampled again) or the file.'
          ) from error
        offset += len(line)
    return offset
