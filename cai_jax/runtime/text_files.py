"""Files that people write: text of several encodings, possibly compressed, and strict JSON.

Files are opened here only if they are regular files, because a read from a pipe or a device may
never end. Compression is recognized by content, not by name.
"""

import codecs
import contextlib
import gzip
import io
import json
import os
import re
import stat
import zlib
from collections.abc import Iterator
from typing import IO, Any

from cai_jax.runtime.errors import UserError

MAX_LINE = 2**24  # characters in one line
# Gzip files that expand further than this are refused: they would fill the memory.
MAX_EXPANSION, MIN_EXPANDED = 200, 2**24  # factor, bytes
MAX_BLANK_LINES = 10**5  # in succession

_SURROGATE = re.compile('[\ud800-\udfff]')
_GZIP = b'\x1f\x8b'
_OTHER_ARCHIVES = {
  b'PK\x03\x04': 'a zip archive',
  b'BZh': 'compressed with bzip2',
  b'\xfd7zXZ\x00': 'compressed with xz',
  b'\x28\xb5\x2f\xfd': 'compressed with zstd',
}
# The mark of UTF-32 begins with that of UTF-16, so it comes first.
_BYTE_ORDER_MARKS = {
  codecs.BOM_UTF8: 'utf-8-sig',
  codecs.BOM_UTF32_LE: 'utf-32',
  codecs.BOM_UTF32_BE: 'utf-32',
  codecs.BOM_UTF16_LE: 'utf-16',
  codecs.BOM_UTF16_BE: 'utf-16',
}


@contextlib.contextmanager
def open_bytes(path: str | os.PathLike) -> Iterator[IO[bytes]]:
  """Open a regular file for reading, and decompress it if its content is gzip.

  Args:
    path: the file.

  Raises:
    UserError: if there is no such file, it is not a regular file, or it cannot be read. Errors of
      the block that come from reading the file become UserErrors, too.
  """
  size = check_regular_file(path)
  try:
    with open(path, 'rb') as raw:
      start = raw.read(8)
      raw.seek(0)
      for mark, kind in _OTHER_ARCHIVES.items():
        if start.startswith(mark):
          raise UserError(f'{path} is {kind}. Decompress it, or compress it with gzip.')
      if not start.startswith(_GZIP):
        yield raw
        return
      limit = max(MAX_EXPANSION * size, MIN_EXPANDED)
      with io.BufferedReader(_Limited(gzip.GzipFile(fileobj=raw), limit, path)) as file:
        yield file
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise UserError(
      f'{path}: the gzip file is damaged: {error}. Compress or download it again.'
    ) from error
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror or error}.') from error


def check_regular_file(path: str | os.PathLike) -> int:
  """Return the size of a file in bytes.

  Raises:
    UserError: if there is no such file, or it is a folder, a pipe or a device.
  """
  try:
    status = os.stat(path)
  except FileNotFoundError as error:
    raise UserError(f'{path}: there is no such file. Give the path of a file.') from error
  except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
    raise UserError(f'{path}: there is no such file: {error}. Give the path of a file.') from error
  if stat.S_ISDIR(status.st_mode):
    raise UserError(f'{path} is a folder. Give the path of a file.')
  if not stat.S_ISREG(status.st_mode):
    raise UserError(f'{path} is a pipe or a device. Give the path of a regular file.')
  return status.st_size


def read_lines(path: str | os.PathLike, keep_ends: bool = False) -> Iterator[tuple[int, str]]:
  """Yield (number, line) for each line of a text file, numbered from 1.

  The text is UTF-8, or UTF-16 or UTF-32 with a byte order mark. A line ends with a line feed, a
  carriage return or both.

  Args:
    path: the file.
    keep_ends: keep the characters that end each line, as `csv.reader` needs them.

  Raises:
    UserError: if the file cannot be read, or a line has another encoding, a NUL character or more
      than `MAX_LINE` characters, or there are more than `MAX_BLANK_LINES` blank lines.
  """
  number = last = 0  # the current line, and the last one that is not blank
  with open_bytes(path) as file:
    start = file.read(4)
    file.seek(0)
    encoding = next((e for mark, e in _BYTE_ORDER_MARKS.items() if start.startswith(mark)), 'utf-8')
    # Bytes that are not UTF-8 become surrogates, so that their line is known.
    errors = 'surrogateescape' if encoding.startswith('utf-8') else 'surrogatepass'
    text = io.TextIOWrapper(file, encoding, errors, newline='' if keep_ends else None)
    try:
      while line := text.readline(MAX_LINE + 1):
        number += 1
        _check_line(line, f'{path}, line {number}')
        last = last if line.isspace() else number
        if number - last > MAX_BLANK_LINES:
          raise UserError(
            f'{path}, line {number}: there are more than {MAX_BLANK_LINES} blank lines in '
            'succession. Remove them.'
          )
        yield number, line if keep_ends else line.removesuffix('\n')
    except UnicodeError as error:
      raise UserError(
        f'{path}, after line {number}: the text is not {encoding.upper()}: {error}. Save the file '
        'as UTF-8.'
      ) from error


def read_text(path: str | os.PathLike, max_size: int) -> str:
  """Return the text of a file that `read_lines` can read.

  Args:
    path: the file.
    max_size: maximum number of characters.

  Raises:
    UserError: if the file cannot be read or is longer.
  """
  lines, size = [], 0
  for _, line in read_lines(path, keep_ends=True):
    lines.append(line)
    size += len(line)
    if size > max_size:
      raise UserError(f'{path} has more than {max_size} characters. Make it shorter.')
  return ''.join(lines)


def parse_json(text: str) -> Any:
  """Return the value of a JSON text.

  Unlike `json.loads`, this refuses a key that occurs twice in an object, NaN, and numbers beyond
  the range of a float.

  Args:
    text: the JSON text.

  Raises:
    ValueError: if the text is not such JSON, or is nested too deeply.
  """
  try:
    return json.loads(
      text, object_pairs_hook=_unique_keys, parse_constant=_refuse, parse_float=_finite
    )
  except RecursionError as error:
    raise ValueError('it is nested too deeply') from error


def check_characters(what: str, text: str) -> None:
  """Check that a text can be stored and tokenized: it has no unpaired surrogate and no NUL.

  Args:
    what: what the text is, for the error message.
    text: the text.

  Raises:
    UserError: if it has one.
  """
  if _SURROGATE.search(text):
    raise UserError(f'{what} contains an unpaired surrogate.')
  if '\0' in text:
    raise UserError(f'{what} contains a NUL character.')


class _Limited(io.RawIOBase):
  """The content of a gzip file, which may not have more than a number of bytes."""

  def __init__(self, file: gzip.GzipFile, limit: int, path: str | os.PathLike):
    self._file, self._limit, self._path = file, limit, path

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    return self._file.seek(offset, whence)

  def readinto(self, buffer: Any) -> int:
    if self._file.tell() > self._limit:
      raise UserError(
        f'{self._path} expands to more than {self._limit} bytes. Decompress it, and give the '
        'file itself.'
      )
    data = self._file.read(len(buffer))
    buffer[: len(data)] = data
    return len(data)


def _check_line(line: str, place: str) -> None:
  if len(line) > MAX_LINE:
    raise UserError(f'{place}: the line has more than {MAX_LINE} characters. Split it.')
  if '\0' in line:
    raise UserError(
      f'{place}: the line contains a NUL character, so the file is not text, or is UTF-16 without '
      'a byte order mark. Save the file as UTF-8.'
    )
  if surrogate := _SURROGATE.search(line):
    raise UserError(
      f'{place}: the text is not UTF-8 (byte 0x{ord(surrogate.group()) & 0xFF:02x}). Save the file '
      'as UTF-8.'
    )


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  row = dict(pairs)
  if len(row) < len(pairs):
    keys: set[str] = set()
    for key, _ in pairs:
      if key in keys:
        raise ValueError(f'the key {key[:40]!r} occurs twice')
      keys.add(key)
  return row


def _refuse(name: str) -> Any:
  raise ValueError(f'{name} is not a JSON value')


def _finite(text: str) -> float:
  number = float(text)
  if abs(number) == float('inf'):
    raise ValueError(f'the number {text[:40]} is too large')
  return number
