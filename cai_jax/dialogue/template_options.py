"""Options of chat templates as a part of the template, for models that are saved."""

import copy
import json
from collections.abc import Sequence
from typing import Any


def bind_template_options(tokenizer: Any, options: Sequence[tuple[str, Any]]) -> Any:
  """Return a tokenizer whose chat template has these options by default.

  Programs that render dialogues with the saved tokenizer then write what the run wrote. They can
  still pass other values.

  Args:
    tokenizer: a tokenizer of `transformers`.
    options: (name, value) pairs; () returns the tokenizer itself.
  """
  if not options:
    return tokenizer
  defaults = ''.join(
    f'{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}'
    for name, value in options
  )
  bound = copy.deepcopy(tokenizer)
  # The empty expression keeps a line break with which the template may begin.
  bound.chat_template = defaults + "{{ '' }}" + tokenizer.get_chat_template()
  return bound


def _literal(value: Any) -> str:
  """Return a value of JSON as a literal of Jinja."""
  if value is None:
    return 'none'
  if isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, dict):
    return '{' + ', '.join(f'{_literal(k)}: {_literal(v)}' for k, v in value.items()) + '}'
  if isinstance(value, list | tuple):
    return '[' + ', '.join(map(_literal, value)) + ']'
  return json.dumps(value, ensure_ascii=False)
