"""The form of a line of the turn journal, which has the turns of one chain.

  {"keys": [KEY, ...], "turns": [TURN, ...], "checksum": "1a2b3c4d"}

A turn is an object with the fields of `Completion`. `usage` is absent if no server sampled it.
"""

import dataclasses
import json
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from cai_jax.sampling.types import FINISH_REASONS, Completion, Usage

# The parts of a line. Indexing a journal reads the keys of a line and does not parse its turns.
# A line ends with a checksum of everything before it. Lines of version 0.1.0 end with `_OLD_END`.
_KEYS, _TURNS, _CHECKSUM, _OLD_END = b'{"keys": ', b', "turns": ', b', "checksum": "', b']}\n'
_END_SIZE = len(_CHECKSUM) + len('12345678"}\n')
_USAGE = 'usage'  # only turns that a server sampled have this field
_FIELDS = tuple(field.name for field in dataclasses.fields(Completion) if field.name != _USAGE)
_USAGE_FIELDS = {field.name for field in dataclasses.fields(Usage)}
_SURROGATE = re.compile('[\ud800-\udfff]')  # no character, and not writable as UTF-8


def format_line(turns: Sequence[tuple[str, Completion]]) -> bytes:
  """Return the line of some turns.

  Args:
    turns: (key, completion) pairs.
  """
  keys = json.dumps([key for key, _ in turns]).encode()
  values = [_to_json(completion) for _, completion in turns]
  line = _KEYS + keys + _TURNS + json.dumps(values).encode()
  return line + _CHECKSUM + b'%08x"}\n' % zlib.crc32(line)


def parse_keys(line: bytes, needs_checksum: bool) -> tuple[list[str], bool]:
  """Return the keys of a line, and whether it has a checksum, without parsing its turns.

  Parsing them would take 20 times as long.

  Args:
    line: the line.
    needs_checksum: whether a line without a checksum is damaged.

  Raises:
    ValueError: if the line is damaged; the message is a clause.
  """
  has_checksum = line[-_END_SIZE:].startswith(_CHECKSUM)
  if has_checksum:
    checksum = b'%08x' % zlib.crc32(memoryview(line)[:-_END_SIZE])
    if line[-_END_SIZE + len(_CHECKSUM) :] != checksum + b'"}\n':
      raise ValueError('its checksum does not match')
  elif needs_checksum or not line.endswith(_OLD_END):
    raise ValueError('it is cut short, or its checksum is missing')
  end = line.find(_TURNS)
  if end < 0 or not line.startswith(_KEYS):
    raise ValueError('it is not a journal entry')
  try:
    keys = json.loads(line[len(_KEYS) : end])
  except (ValueError, RecursionError):
    keys = None
  if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
    raise ValueError('its keys cannot be read')
  return keys, has_checksum


def find_fault(turn: Any, vocab_size: int | None, finite: bool) -> str:
  """Return why a stored turn cannot be the completion of a model, or '' if it can.

  Args:
    turn: the turn, as its line has it.
    vocab_size: number of token ids of the model, if it is known.
    finite: whether every log-probability must be a number.
  """
  if not isinstance(turn, dict) or turn.keys() - {_USAGE} != {*_FIELDS}:
    return f'a turn needs exactly the fields {", ".join(_FIELDS)}'
  if _USAGE in turn and not _is_usage(turn[_USAGE]):
    return 'its usage is not one of a server'
  tokens, logprobs, text = turn['tokens'], turn['logprobs'], turn['text']
  if not isinstance(tokens, list) or not {int}.issuperset(map(type, tokens)):
    return 'its token ids are not integers'
  if tokens and not 0 <= min(tokens) <= max(tokens) < (vocab_size or math.inf):
    return 'a token id is outside the vocabulary'
  if not isinstance(logprobs, list) or not {float}.issuperset(map(type, logprobs)):
    return 'its log-probabilities are not numbers'
  if len(logprobs) != len(tokens):
    return f'it has {len(tokens)} tokens and {len(logprobs)} log-probabilities'
  if math.inf in map(abs, logprobs) or (finite and any(map(math.isnan, logprobs))):
    return 'a log-probability is not finite'
  if not isinstance(text, str) or _SURROGATE.search(text):
    return 'its text is not text'
  if turn['finish_reason'] not in FINISH_REASONS:
    return 'its finish_reason is unknown'
  return ''


def read_turn(turn: dict[str, Any]) -> Completion:
  """Return the completion of a stored turn.

  Args:
    turn: the turn, in which `find_fault` finds nothing.
  """
  usage = turn.get(_USAGE)
  return Completion(**turn | ({_USAGE: Usage(**usage)} if usage else {}))


def line_usage(line: bytes, prefix: str = '') -> Iterator[Usage]:
  """Yield what servers counted for each turn of a line; nothing if it is damaged.

  Args:
    line: the line.
    prefix: only turns whose key begins with it count.
  """
  try:
    entry = json.loads(line)
    turns = zip(entry['keys'], entry['turns'], strict=True)
    found = [turn[_USAGE] for key, turn in turns if key.startswith(prefix) and _USAGE in turn]
  except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
    return
  yield from (Usage(**usage) for usage in found if _is_usage(usage))


def _to_json(completion: Completion) -> dict[str, Any]:
  """Return the fields of a completion as its line has them."""
  # dataclasses.asdict copies every list item by item, which makes `put` four times as slow.
  turn = {name: getattr(completion, name) for name in _FIELDS}
  return turn if completion.usage is None else turn | {_USAGE: vars(completion.usage)}


def _is_usage(value: Any) -> bool:
  """Return whether a stored value has the fields of a server's usage, which are counts or None."""
  return (
    isinstance(value, dict)
    and value.keys() == _USAGE_FIELDS
    and all(count is None or (type(count) is int and count >= 0) for count in value.values())
    and value['attempts'] is not None
  )
