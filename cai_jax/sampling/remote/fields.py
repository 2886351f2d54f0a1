"""The body of a response, and its fields with the types that the API gives them."""

import json
from collections.abc import Mapping
from typing import Any, NoReturn


class ProtocolError(Exception):
  """An answer that does not follow the completions API."""


def parse_body(data: bytes) -> dict[str, Any]:
  """Return the object in a body.

  Raises:
    ProtocolError: if it is not one of JSON.
  """
  try:
    content = json.loads(data, parse_constant=_refuse_constant)
  except (ValueError, RecursionError) as error:
    raise ProtocolError(f'it is not JSON: {error}') from None
  return typed(content, dict, 'the answer')


def typed(value: Any, kind: type, name: str) -> Any:
  """Return a value of a JSON type.

  Args:
    value: the value.
    kind: its type, such as dict.
    name: what it is, for the message.

  Raises:
    ProtocolError: if it has another type.
  """
  if type(value) is not kind:  # not `isinstance`, because True is an int
    raise ProtocolError(f'{name} is not of type {kind.__name__}')
  return value


def optional(content: Mapping[str, Any], name: str, kind: type) -> Any:
  """Return a field as `typed` does, or None if it is absent or null.

  Args:
    content: the object.
    name: name of the field.
    kind: its type.
  """
  value = content.get(name)
  return None if value is None else typed(value, kind, name)


def read_list(content: Mapping[str, Any], name: str) -> list[Any]:
  """Return a field that is a list; [] if it is absent or null.

  Args:
    content: the object.
    name: name of the field.
  """
  return optional(content, name, list) or []


def read_text(value: Any, name: str) -> str:
  """Return a text that can be written as UTF-8.

  Args:
    value: the value.
    name: what it is, for the message.

  Raises:
    ProtocolError: if it is something else.
  """
  text = typed(value, str, name)
  try:
    text.encode()
  except UnicodeEncodeError:
    raise ProtocolError(f'{name} has half of a surrogate pair') from None
  return text


def _refuse_constant(name: str) -> NoReturn:
  raise ValueError(f'{name} is not a number in JSON')
