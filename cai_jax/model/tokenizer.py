"""Load the tokenizer of a model's folder, and check that its files agree with each other."""

import pathlib
from typing import Any

import tokenizers
import transformers

from cai_jax.model.families.fields import is_number
from cai_jax.runtime.errors import UserError, show
from cai_jax.runtime.files import read_json

CONFIG = 'tokenizer_config.json'
_OTHER_FILES = ('special_tokens_map.json', 'added_tokens.json')
_FLAGS = (
  'clean_up_tokenization_spaces',
  'split_special_tokens',
  'add_prefix_space',
  'add_bos_token',
  'add_eos_token',
)


def load_tokenizer(folder: pathlib.Path, vocab_size: int | None) -> Any:
  """Load the tokenizer of a folder, as a transformers.PreTrainedTokenizerFast.

  Args:
    folder: the model's folder.
    vocab_size: number of rows of the model's embedding; None if unknown.

  Raises:
    UserError: if there is no tokenizer, it cannot be read, it has more tokens than the model, or
      its files contradict each other.
  """
  # A tokenizer.json is read as it is. AutoTokenizer of transformers 5 may rebuild it with the
  # splitting rules that are usual for the model's type.
  has_json = (folder / 'tokenizer.json').exists()
  if not has_json and not any((folder / f).exists() for f in ('tokenizer.model', 'vocab.json')):
    # AutoTokenizer would return an empty tokenizer of the model's type.
    raise UserError(f'{folder} has no tokenizer. Put its tokenizer.json there.')
  try:
    if has_json:
      tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    else:
      tokenizer = transformers.AutoTokenizer.from_pretrained(
        folder, use_fast=True, trust_remote_code=False
      )
  except Exception as error:  # the type depends on the fault and on the version of transformers
    _check_readable(folder)
    raise UserError(
      f'{folder} has no tokenizer that can be read, although its tokenizer.json can: {error}. '
      f'Correct {CONFIG}, or download the files again.'
    ) from error
  if not tokenizer.is_fast:
    raise UserError(
      f'{folder}: {type(tokenizer).__name__} is a slow tokenizer, which is not supported. Put a '
      'tokenizer.json there.'
    )
  _check_vocabulary(folder, tokenizer.get_vocab(), vocab_size)
  _check_settings(folder, tokenizer)
  return tokenizer


def _check_readable(folder: pathlib.Path) -> None:
  """Raise an error that names the file, if one of a tokenizer's files cannot be read alone."""
  for name in (CONFIG, *_OTHER_FILES):
    if (folder / name).exists():
      read_json(folder / name)
  path = folder / 'tokenizer.json'
  if path.exists():
    try:
      tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
      raise UserError(
        f'{path}: no tokenizer that can be read: {error}. Download the file again.'
      ) from error


def _check_vocabulary(
  folder: pathlib.Path, vocabulary: dict[str, int], vocab_size: int | None
) -> None:
  """Check that each token has its own id, and that the model embeds it."""
  path = folder / 'tokenizer.json'
  if not vocabulary:
    raise UserError(f'{path} has no tokens. Put the tokenizer of the model there.')
  if len(set(vocabulary.values())) < len(vocabulary):
    tokens: dict[int, str] = {}
    for token, number in vocabulary.items():
      if number in tokens:
        raise UserError(
          f'{path} has {show(tokens[number])} and {show(token)} as token {number}. Put the '
          'tokenizer of the model there.'
        )
      tokens[number] = token
  token, largest_id = max(vocabulary.items(), key=lambda item: item[1])
  if vocab_size is not None and largest_id >= vocab_size:
    raise UserError(
      f'{path}: the tokenizer has {show(token)} as token {largest_id}, but the model embeds '
      f'{vocab_size} tokens only (vocab_size in config.json). Use the tokenizer of this model, or '
      'resize its embedding.'
    )


def _check_settings(folder: pathlib.Path, tokenizer: Any) -> None:
  """Check that the other files of a tokenizer have the right types and agree with it."""
  path = folder / CONFIG
  settings = read_json(path) if path.exists() else {}
  for name in _FLAGS:
    if not isinstance(settings.get(name), bool | None):
      raise UserError(f'{path}: {name} is {show(settings[name])}; it must be true or false.')
  if not is_number(tokenizer.model_max_length) or tokenizer.model_max_length < 1:
    raise UserError(
      f'{path}: model_max_length is {show(settings.get("model_max_length"))}; it must be a '
      'positive number of tokens.'
    )
  template, own = tokenizer.chat_template, settings.get('chat_template')
  # Not all programs prefer the same place.
  if isinstance(own, str) and isinstance(template, str) and own.strip() != template.strip():
    raise UserError(
      f'{path}: chat_template differs from that of chat_template.jinja or chat_template.json. '
      'Remove the one that the model was not trained with.'
    )
  templates = template.values() if isinstance(template, dict) else [template or '']
  if not all(isinstance(text, str) for text in templates):
    raise UserError(
      f'{path}: chat_template is {show(template)}; it must be a text, or a list of objects with '
      'name and template.'
    )
  for name in _OTHER_FILES:
    if (folder / name).exists():
      _check_other_file(folder / name, read_json(folder / name), settings, tokenizer)
  decoder = settings.get('added_tokens_decoder') or {}
  for number, entry in decoder.items():
    if isinstance(entry, dict):
      _check_added_token(path, entry.get('content'), number, tokenizer)


def _check_other_file(
  path: pathlib.Path, entries: dict[str, Any], settings: dict[str, Any], tokenizer: Any
) -> None:
  """Check special_tokens_map.json or added_tokens.json against the tokenizer."""
  if path.name == 'added_tokens.json':
    for token, number in entries.items():
      _check_added_token(path, token, number, tokenizer)
    return
  for name in ('bos_token', 'eos_token'):  # versions of transformers prefer different files
    stated, other = (_content(source.get(name)) for source in (entries, settings))
    if stated is not None and other is not None and stated != other:
      raise UserError(
        f'{path}: {name} is {show(stated)}, but {CONFIG} has {show(other)}. Correct one of them.'
      )


def _check_added_token(path: pathlib.Path, token: Any, number: Any, tokenizer: Any) -> None:
  """Check that a token of a file has the id that the tokenizer gives it."""
  actual = tokenizer.convert_tokens_to_ids(token) if isinstance(token, str) else None
  if str(actual) != str(number):
    raise UserError(
      f'{path}: {show(token)} is token {show(number)}, but tokenizer.json has it as {actual}. Use '
      'the files of one tokenizer.'
    )


def _content(token: Any) -> str | None:
  """Return the text of a special token, which can be an object with attributes."""
  return token.get('content') if isinstance(token, dict) else token
