"""generation_config.json and the token ids of a model: read, checked, and written again."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from cai_jax.model.families.fields import is_number
from cai_jax.runtime.errors import UserError, show
from cai_jax.runtime.files import read_json

FILE = 'generation_config.json'
_TOKENS = ('bos_token_id', 'eos_token_id', 'pad_token_id')

# Sampling settings that servers take from generation_config.json: the smallest and largest value.
_RANGES = {
  'temperature': (0.0, 1e6),
  'top_p': (0.0, 1.0),
  'min_p': (0.0, 1.0),
  'typical_p': (0.0, 1.0),
  'top_k': (-1, 2**31 - 1),  # some servers use -1 to disable it
  'repetition_penalty': (1e-6, 1e6),
  'length_penalty': (-1e6, 1e6),
  'max_length': (0, 2**31 - 1),
  'max_new_tokens': (0, 2**31 - 1),
}


def read_generation_config(folder: pathlib.Path, vocab_size: int | None) -> dict[str, Any]:
  """Return the checked content of generation_config.json; {} if there is no such file.

  Args:
    folder: the model's folder.
    vocab_size: number of token ids of the model; None if unknown.

  Raises:
    UserError: if the file is not a JSON object, or an entry has a wrong type or value.
  """
  path = folder / FILE
  if not path.exists():
    return {}
  entries = read_json(path)
  check_token_ids(entries, path, vocab_size)
  for name, (smallest, largest) in _RANGES.items():
    value = entries.get(name)
    if value is not None and not (is_number(value) and smallest <= value <= largest):
      raise UserError(
        f'{path}: {name} is {show(value)}; it must be from {smallest:g} to {largest:g}.'
      )
  if not isinstance(entries.get('do_sample'), bool | None):
    raise UserError(f'{path}: do_sample is {show(entries["do_sample"])}; it must be true or false.')
  return entries


def check_token_ids(entries: Mapping[str, Any], path: pathlib.Path, vocab_size: int | None) -> None:
  """Check the ids of the special tokens in a config.

  Args:
    entries: content of config.json or generation_config.json.
    path: the file, for the message.
    vocab_size: number of token ids of the model; None if unknown.

  Raises:
    UserError: if an id is not an integer, or is outside the vocabulary.
  """
  for name in _TOKENS:
    value = entries.get(name)
    for token in value if isinstance(value, list) else [value]:
      # Early Llama checkpoints have -1 where there is no padding token.
      if token is None and value is None or token == -1 and name == 'pad_token_id':
        continue
      if isinstance(token, bool) or not isinstance(token, int):
        raise UserError(
          f'{path}: {name} is {show(value)}; it must be a token id or a list of token ids.'
        )
      if token < 0 or (vocab_size is not None and token >= vocab_size):
        raise UserError(
          f'{path}: {name} is {show(value)}, but token ids are at least 0 and below the '
          f'vocab_size of config.json, {vocab_size}. Correct one of them.'
        )


def choose_eos_token_ids(*stated: Any) -> tuple[int, ...]:
  """Return the tokens that end a reply: the first value that is stated.

  Args:
    stated: values of eos_token_id, most important first: None, an id or a list of ids.
  """
  for eos in stated:
    if eos is not None:
      return tuple(eos) if isinstance(eos, list) else (eos,)
  return ()


def special_token_ids(
  tokenizer: Any, eos: Sequence[int], generation_config: Mapping[str, Any]
) -> dict[str, Any]:
  """Return the entries for special tokens that config.json and generation_config.json share.

  Args:
    tokenizer: the model's tokenizer.
    eos: tokens that end a reply.
    generation_config: entries of the model's generation_config.json, for what the tokenizer does
      not state.
  """

  def stated(name: str) -> Any:
    token = getattr(tokenizer, name)
    return generation_config.get(name) if token is None else token

  return {
    'bos_token_id': stated('bos_token_id'),
    'eos_token_id': eos[0] if len(eos) == 1 else list(eos) or None,
    'pad_token_id': stated('pad_token_id'),
  }
