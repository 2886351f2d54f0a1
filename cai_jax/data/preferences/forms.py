"""Forms in which people keep comparisons, registered by name.

A form reads a path and yields (place, item) for each comparison that the path has. The place is the
file with the line or row, for messages. The item is a `Comparison`, or the reason for which one is
left out, such as 'identical'; reasons are counted. What cannot be read at all is a `UserError`,
which the form yields as an item as well, so that the caller decides whether it ends the run.

  @FORMS.register('two_columns')
  def read_two_columns(path, pairs):
    for place, row in read_rows(path):
      yield place, attempt(parse_two_columns, row)
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from cai_jax.data import prompt_files as prompt_files  # importing it registers the file formats
from cai_jax.data.dialogues import Messages
from cai_jax.data.preferences.comparisons import Comparison
from cai_jax.data.prompt_sources import ROW_FORM, SOURCES, PromptSource
from cai_jax.runtime.errors import UserError, show
from cai_jax.runtime.registry import Registry

FILES = ('.jsonl', '.ndjson', '.json', '.parquet')  # suffixes, each also with .gz
Item = tuple[str, Comparison | str | UserError]  # place; comparison, reason to leave it out, fault

# (path, pairs) → items. `pairs` chooses the pairs of D_CAI; other forms do not read it.
FORMS: Registry[Callable[[str, str], Iterator[Item]]] = Registry('form of comparisons')

T = TypeVar('T')


def read_rows(path: str | os.PathLike) -> Iterator[tuple[str, Any]]:
  """Yield (place, row) for each row of a file, which may be compressed with gzip.

  Args:
    path: a .jsonl file (also .ndjson), a .json file with an array, or a .parquet file.

  Raises:
    UserError: if the file has another suffix or cannot be read, or a line is not JSON.
  """
  path = os.fspath(path)
  suffix = os.path.splitext(path.lower().removesuffix('.gz'))[1]
  if suffix not in FILES:
    raise UserError(
      f'{path}: a file of preferences must end in one of {FILES}, plus .gz if it is compressed.'
    )
  try:
    yield from SOURCES[suffix](PromptSource(source=path), 0)
  except UserError as error:
    raise UserError(str(error).replace(ROW_FORM, 'Write one object per row.')) from error


def attempt(parse: Callable[[Any], T], row: Any) -> T | UserError:
  """Return what a row contains, or the error that says why it cannot be read.

  Args:
    parse: reads a row.
    row: the row.
  """
  try:
    if not isinstance(row, dict):
      raise UserError(f'A row must be an object, but got {show(row)}.')
    return parse(row)
  except UserError as error:
    return error
  except RecursionError:
    return UserError('The row is nested too deeply.')


def row_id(row: Mapping[str, Any], content: Sequence[Any]) -> str:
  """Return the id of a row, or a hash of its content if it has none.

  Args:
    row: the row, with or without an `id`.
    content: what the hash identifies.

  Raises:
    UserError: if the id is neither text nor an integer.
  """
  if row.get('id') is None:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
  if isinstance(row['id'], bool) or not isinstance(row['id'], str | int):
    raise UserError(f'An id must be an integer or non-empty text, but got {show(row["id"])}.')
  return str(row['id'])


def digest64(value: Any) -> int:
  """Return a 64-bit hash of a value that JSON can hold.

  In a million values, two have the same hash with a probability of 3e-8.

  Args:
    value: the value.
  """
  return int.from_bytes(hashlib.sha256(json.dumps(value).encode()).digest()[:8])


def reason_to_leave_out(chosen: str, rejected: str, sampled: bool = False) -> str:
  """Return why two texts are no comparison, or '' if they are one.

  Args:
    chosen: the first text, without surrounding white space.
    rejected: the second text, without surrounding white space.
    sampled: whether a model wrote them. It may write a NUL character, which no text of a file has.

  Returns:
    'empty', 'identical', 'nul_character' or ''.
  """
  if not chosen or not rejected:
    return 'empty'
  if sampled and '\0' in chosen + rejected:
    return 'nul_character'
  return 'identical' if chosen == rejected else ''


def last_reply(name: str, messages: Messages) -> tuple[Messages, str]:
  """Split a dialogue into its prompt and the text of the assistant's last turn.

  Args:
    name: what the dialogue is called in messages.
    messages: the dialogue.

  Raises:
    UserError: if the last message is not the assistant's, or its content is not text.
  """
  if not messages or messages[-1]['role'] != 'assistant':
    raise UserError(
      f'{name} must end with a message of the assistant, but got {show(messages[-1:])}.'
    )
  if not isinstance(messages[-1]['content'], str):
    raise UserError(f'The content of {name} must be text, but got {show(messages[-1])}.')
  return messages[:-1], messages[-1]['content'].strip()
