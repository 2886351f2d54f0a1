"""The turn journal, which stores every finished turn under a hash of all that determines it."""

import array
import dataclasses
import errno
import hashlib
import io
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from cai_jax.runtime.cloud.direct import is_private
from cai_jax.runtime.errors import StoppedError, UserError
from cai_jax.runtime.files import make_folder, writing
from cai_jax.runtime.replicas import ALONE, Replica
from cai_jax.sampling.journal_lines import (
  find_fault,
  format_line,
  line_usage,
  parse_keys,
  read_turn,
)
from cai_jax.sampling.noise import SAMPLER
from cai_jax.sampling.types import Completion, SamplingConfig, Usage

# Every key contains these settings; the stop texts and tokens are a part of `stop`. Any other field
# of SamplingConfig is part of the key unless it has its default, which must be neutral.
_IN_EVERY_KEY = ('temperature', 'top_k', 'top_p', 'max_tokens')
_IN_STOP = ('stop', 'stop_token_ids')
_OTHERS = tuple(
  (field.name, field.default)
  for field in dataclasses.fields(SamplingConfig)
  if field.name not in _IN_EVERY_KEY + _IN_STOP
)
_MARKER = f'sampler-{SAMPLER}'  # a file that names the sampler of all turns in the folder
VISIBLE_SECONDS = 60.0  # until a shared filesystem shows all processes what one has written
_LISTED_FAULTS = 3  # of all faults, how many a message describes


def digest(
  fingerprint: str,
  context: list[int],
  sampling: SamplingConfig,
  stop: tuple[tuple[int, ...], tuple[str, ...]],
  key: bytes,
  sampler: str,
  messages: tuple[tuple[str, str], ...] = (),
) -> str:
  """Return the key of a turn: a hex digest of everything that determines its reply.

  A field that is added to `SamplingConfig` is part of the key as soon as it differs from its
  default, so the keys of existing journals stay the same.

  Args:
    fingerprint: fingerprint of the model.
    context: token ids that precede the reply.
    sampling: sampling settings.
    stop: all token ids and all texts that end the reply.
    key: the turn's random key.
    sampler: name of our sampler; '' if a server samples the turn.
    messages: what a chat-only server reads in place of the context; () for every other model.
  """
  settings = [*(getattr(sampling, name) for name in _IN_EVERY_KEY), *stop]
  changed = {n: getattr(sampling, n) for n, default in _OTHERS if getattr(sampling, n) != default}
  settings += [changed] if changed else []
  parts = [fingerprint, settings, key.hex(), *([sampler] if sampler else [])]
  if messages:
    parts, context = [*parts, messages], []
  text = json.dumps(parts, sort_keys=True)
  tokens = np.array(context, '<i4')  # as JSON, a long context takes four times as long
  return hashlib.sha256(text.encode() + tokens.tobytes()).hexdigest()[:32]


def check_sampler(folder: str | os.PathLike) -> None:
  """Check that a folder does not hold turns of a journal that another sampler began.

  The folder names the sampler by an empty file, which `Journal` writes before the first turn.
  Versions before the sampler 'gumbel-1' wrote none.

  Args:
    folder: the journal's folder; it need not exist.

  Raises:
    UserError: if it does.
  """
  folder = pathlib.Path(folder)
  if _has_turns(folder) and not (folder / _MARKER).exists():
    raise UserError(
      f'{folder} holds turns of another sampler than {SAMPLER}, which draws other tokens from the '
      'same model. Start in another workdir, or use the version of cai_jax that wrote it. '
      "Finished rows of D_CAI can be trained on in another workdir with data.d_cai='OLD/d_cai'."
    )


def _has_turns(folder: pathlib.Path) -> bool:
  return any(path.stat().st_size for path in folder.glob('turns-*.jsonl') if path.is_file())


def _wait_for(path: pathlib.Path, size: int) -> None:
  """Wait until a file that another process has written has so many bytes here.

  Raises:
    StoppedError: if it does not get them in `VISIBLE_SECONDS`.
  """
  end = time.monotonic() + VISIBLE_SECONDS
  while not path.exists() or path.stat().st_size < size:
    if time.monotonic() > end:
      raise StoppedError(
        f'This process does not see the {size} bytes of {path} that another one sees. Give all '
        'processes the same workdir on a filesystem that they share.'
      )
    time.sleep(0.1)


class Journal:
  """An append-only store of completions in a folder, with one file per writing process.

  Each line contains the turns of one chain and their checksum, so if the process is killed, either
  all of them are stored or none. `put` passes every line to the operating system before it returns.
  A killed process therefore loses no stored turn, but a machine that crashes may lose those of the
  last seconds.

  A line that was cut short or changed counts as absent, and so does a turn that the model cannot
  have sampled. They are counted as faults, and the engine samples such turns again. Nothing in a
  journal is an error, except that `check_sampler` refuses the folder of another sampler.

  The index takes 20 bytes of host memory per turn. It covers the turns that all processes had
  stored by the last `refresh`, which also runs on opening. `put` does not add to it, because the
  engine looks up each turn once, before sampling it, and chain ids and turn names are unique in a
  run. If a turn were looked up again, it would be sampled again, with the same tokens.

  In a replica of several processes, the leader writes. The others index the same lines as it does,
  and so find the same turns.

  Args:
    folder: the journal's folder, created if it does not exist.
    process: number of this process or replica, which selects the file that it writes.
    replica: the replica of this process, whose processes open and refresh the journal together.

  Attributes:
    num_faults: number of lines and turns that were found damaged.
  """

  def __init__(self, folder: str | os.PathLike, process: int = 0, replica: Replica = ALONE):
    self._folder, self._replica = pathlib.Path(folder), replica
    self._paths: list[pathlib.Path] = []
    self._indexed: list[int] = []  # for each path, the number of bytes that are indexed
    self._lines: list[int] = []  # for each path, the number of lines that are indexed
    self._has_checksums: list[bool] = []  # for each path, whether its latest line has one
    self._faults: list[str] = []
    self.num_faults = 0
    self._latest: tuple[tuple[int, int] | None, Any] = None, None  # the line that was read last
    # The index, sorted by hash. Keys with equal hashes are compared on disk.
    self._hashes = np.empty(0, np.int64)
    self._files = np.empty(0, np.int32)  # indices into `_paths`
    self._offsets = np.empty(0, np.int64)  # byte offsets of lines
    self._num_unindexed = 0  # turns stored here since the last refresh
    self._file: io.FileIO | None = None
    self._own = f'turns-{process:05d}.jsonl'
    self._common: dict[str, int] = {}  # bytes of files that all processes have, if they may differ
    self._index_together(lambda: self._begin(self._own))

  def _begin(self, name: str) -> dict[str, int]:
    """Create the folder, index its files and open the file of this name; see `_index_files`."""
    make_folder(self._folder)
    if not _has_turns(self._folder):
      with writing(self._folder / _MARKER):
        (self._folder / _MARKER).touch()
    sizes = self._index_files()
    self._open(self._folder / name)
    return sizes

  def _open(self, own: pathlib.Path) -> None:
    """Open the file that this process writes, without a line at its end that was cut short."""
    with writing(own):
      if own in self._paths:
        file = self._paths.index(own)
        if own.stat().st_size > self._indexed[file]:
          self._add_fault(own, self._lines[file] + 1, 'it is cut short')
          os.truncate(own, self._indexed[file])
      self._file = open(own, 'ab', buffering=0)

  def __len__(self) -> int:
    return len(self._hashes) + self._num_unindexed

  @property
  def folder(self) -> pathlib.Path:
    """The journal's folder."""
    return self._folder

  def get(self, key: str, vocab_size: int | None = None, finite: bool = False) -> Completion | None:
    """Return the completion that was stored under a key at the last `refresh`, or None.

    Args:
      key: the key of the turn, from `digest`.
      vocab_size: number of token ids of the model; a turn with a larger one is damaged. None does
        not check it.
      finite: whether every log-probability is a number. Those of served models may be NaN.
    """
    key_hash = hash(key)
    index = int(np.searchsorted(self._hashes, key_hash))
    while index < len(self._hashes) and self._hashes[index] == key_hash:
      file, offset = int(self._files[index]), int(self._offsets[index])
      keys, turns = self._read_line(file, offset) or ([key], [None])
      if key in keys:
        turn = turns[keys.index(key)]
        fault = find_fault(turn, vocab_size, finite)
        if not fault:
          return read_turn(turn)
        self._add_fault(self._paths[file], offset, fault, is_offset=True)
      index += 1
    return None

  def put(self, turns: list[tuple[str, Completion]]) -> None:
    """Store (key, completion) pairs atomically, in one line. Only the leader of a replica writes.

    Args:
      turns: the pairs of one chain.

    Raises:
      StoppedError: if the disk is full, or the file was deleted.
    """
    if self._file is None:
      return
    line = format_line(turns)
    with writing(self._file.name):
      if os.fstat(self._file.fileno()).st_nlink == 0:  # what is written now would be lost
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
      # The next start drops a line that is cut short.
      if self._file.write(line) != len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    self._num_unindexed += len(turns)

  def refresh(self) -> None:
    """Index the lines that any process has written since the last refresh."""
    self._index_together(self._index_files)

  def _index_together(self, index: Callable[[], dict[str, int]]) -> None:
    """Call `index` in the leader, and index the same bytes in the other processes.

    If it fails, such as on a full disk, all processes raise an error. If each process has a folder
    of its own, they index what all of them have: the leader goes on to write, and so do other
    launches between the moments in which the processes fetch their files.
    """
    if self._replica.is_split and is_private(self._folder):
      found = {path.name: path.stat().st_size for path in self._find_files()}
      listed = self._replica.gather(found)
      self._common = {name: min(sizes.get(name, 0) for sizes in listed) for name in listed[0]}
    sizes = self._replica.share(index)
    if not self._replica.leads:
      for name, size in sizes.items():
        _wait_for(self._folder / name, size)
      self._index(sizes)

  def _index_files(self) -> dict[str, int]:
    """Index all files, and return how many bytes of each are indexed, by name."""
    paths = dict.fromkeys((*self._paths, *self._find_files()))
    sizes = {path.name: path.stat().st_size for path in paths}
    common = dict(self._common)
    if self._file is None:  # what follows the indexed bytes of its own file is cut off
      common.pop(self._own, None)
    known = {path.name for path in self._paths}
    limited = {name: min(size, common.get(name, size)) for name, size in sizes.items()}
    self._index({name: size for name, size in limited.items() if size or name in known})
    return {path.name: size for path, size in zip(self._paths, self._indexed, strict=True)}

  def _find_files(self) -> list[pathlib.Path]:
    """Return the files of turns."""
    return sorted(path for path in self._folder.glob('turns-*.jsonl') if path.is_file())

  def _index(self, sizes: Mapping[str, int]) -> None:
    """Index the new lines among the first bytes of each file, whose number is given by name."""
    known = {path.name for path in self._paths}
    new = [self._folder / name for name in sizes if name not in known]
    self._paths += new
    self._indexed += [0] * len(new)
    self._lines += [0] * len(new)
    self._has_checksums += [False] * len(new)
    parts = [(self._hashes, self._files, self._offsets)]
    for file, path in enumerate(self._paths):
      hashes, offsets = self._index_new_lines(file, path, sizes[path.name])
      parts.append((hashes, np.full(len(hashes), file, np.int32), offsets))
    self._num_unindexed = 0
    if any(len(hashes) for hashes, _, _ in parts[1:]):
      columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
      order = np.argsort(columns[0], kind='stable')  # of equal keys, `get` finds the earliest
      self._hashes, self._files, self._offsets = (column[order] for column in columns)

  def describe_faults(self) -> str:
    """Return what was found damaged as a line of text; '' if nothing was."""
    if not self.num_faults:
      return ''
    more = self.num_faults - len(self._faults)
    listed = '; '.join(self._faults) + (f'; and {more} more' if more else '')
    return f'journal: {self.num_faults} damaged entries, whose turns are sampled again ({listed})'

  def close(self) -> None:
    """Flush everything to disk and close the file."""
    if self._file is None:
      return
    with writing(self._file.name):
      os.fsync(self._file.fileno())
      self._file.close()

  def _index_new_lines(
    self, file: int, path: pathlib.Path, size: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Return key hashes i64[N] and line offsets i64[N] of the turns not indexed yet.

    Args:
      file: index of the file.
      path: the file.
      size: number of its bytes to read.
    """
    hashes, offsets = array.array('q'), array.array('q')
    offset = self._indexed[file]
    if size > offset:
      with open(path, 'rb', buffering=1 << 20) as lines:
        lines.seek(offset)
        for line in lines:
          # Stop at a line that a kill cut short. By now its process may have truncated it and
          # written beyond it, so lines past the file's earlier size are left for later too.
          if not line.endswith(b'\n') or offset + len(line) > size:
            break
          self._lines[file] += 1
          try:
            keys, has_checksum = parse_keys(line, self._has_checksums[file])
          except ValueError as error:
            self._add_fault(path, self._lines[file], str(error))
          else:
            self._has_checksums[file] = has_checksum
            for key in keys:
              hashes.append(hash(key))
              offsets.append(offset)
          offset += len(line)
    self._indexed[file] = offset
    return np.array(hashes, np.int64), np.array(offsets, np.int64)

  def _read_line(self, file: int, offset: int) -> tuple[list, list] | None:
    """Return keys and turns of a line, or None if it is damaged.

    The last line is cached, because the turns of a chain share a line.
    """
    if self._latest[0] != (file, offset):
      with open(self._paths[file], 'rb') as lines:
        lines.seek(offset)
        text = lines.readline()
      try:
        line = json.loads(text)
        keys, turns = line['keys'], line['turns']
        is_whole = isinstance(turns, list) and len(keys) == len(turns)
      except (ValueError, RecursionError, KeyError, TypeError):
        is_whole = False
      self._latest = (file, offset), ((keys, turns) if is_whole else None)
    return self._latest[1]

  def _add_fault(
    self, path: pathlib.Path, place: int, reason: str, is_offset: bool = False
  ) -> None:
    """Count a damaged line or turn, and describe the first ones by file and line.

    Args:
      path: the file.
      place: number of the line, from 1, or its byte offset.
      reason: what is wrong with it, as a clause.
      is_offset: whether `place` is an offset.
    """
    self.num_faults += 1
    if len(self._faults) < _LISTED_FAULTS:
      number = _line_number(path, place) if is_offset else place
      self._faults.append(f'{path}, line {number}: {reason}')


def read_usage(folder: str | os.PathLike, prefix: str = '') -> Iterator[Usage]:
  """Yield what servers counted for each turn of a journal; damaged lines are left out.

  Args:
    folder: the journal's folder; it need not exist, and is not written to.
    prefix: only turns whose key begins with it count.
  """
  for path in sorted(pathlib.Path(folder).glob('turns-*.jsonl')):
    with open(path, 'rb') as lines:
      for line in lines:
        yield from line_usage(line, prefix)


def _line_number(path: pathlib.Path, offset: int) -> int:
  """Return the number of the line at a byte offset, from 1."""
  number = 1
  with open(path, 'rb') as lines:
    while offset > 0:
      offset -= len(lines.readline())
      number += 1
  return number
