"""The types of settings: checks and conversions."""

import dataclasses
import functools
import numbers
import typing
from typing import Any

from ml_collections import ConfigDict

from cai_jax.runtime.errors import UserError

# Largest number of a field without a limit of its own; integers reach the devices as 32 bits.
LARGEST = {int: 2**31 - 1, float: 1e12}
# A wrong value of these fields may be a secret that was put in the wrong place.
_SECRET = ('api_key_env', 'url')


def convert(
  value: Any, hint: Any, name: str, most: float | None = None, word: str | None = None
) -> Any:
  """Return a config value as the type of its field.

  Integers become floats, and lists become tuples. Any other value of another type is refused.

  Args:
    value: the value.
    hint: type hint of the field: bool, int, float, str, Any or a tuple of these.
    name: dotted name of the field, for error messages.
    most: largest allowed number; None means that of `LARGEST`.
    word: a text that the field may have instead of a value of its type; None allows none.

  Raises:
    UserError: if the value has another type, or is a number or a text that no field can have.
  """
  if word is not None:
    if isinstance(value, str) and value == word:
      return value
    if isinstance(value, str) and hint is not str:
      raise _wrong_type(value, name, _describe_hint(hint, word))
  if typing.get_origin(hint) is tuple:
    return _convert_tuple(value, typing.get_args(hint), name, most)
  number = isinstance(value, numbers.Real) and not isinstance(value, bool)
  if hint is Any:
    if value is None:
      return value
    hint = next((t for t in (bool, int, float, str) if isinstance(value, t)), Any)
  if hint is bool and isinstance(value, bool):
    return value
  if hint is int and number and isinstance(value, numbers.Integral):
    return int(_check_number(value, name, most or LARGEST[int]))
  if hint is float and number:
    return float(_check_number(value, name, most or LARGEST[float]))
  if hint is str and isinstance(value, str):
    return _check_text(value, name)
  raise _wrong_type(value, name, _describe_hint(hint, word))


def convert_fields(settings: Any, section: str) -> None:
  """Convert each field of a frozen dataclass to its type, in place; for `__post_init__`.

  Args:
    settings: the dataclass instance.
    section: what the fields belong to, for error messages.

  Raises:
    UserError: if a value has another type than its field.
  """
  hints = _type_hints(settings.__class__)
  for field in dataclasses.fields(settings):
    value, metadata = getattr(settings, field.name), field.metadata
    limits = metadata.get('most'), metadata.get('word')
    value = convert(value, hints[field.name], f'{section}: {field.name}', *limits)
    object.__setattr__(settings, field.name, value)


@functools.cache
def _type_hints(settings: type) -> dict[str, Any]:
  return typing.get_type_hints(settings)


_KINDS = {
  bool: 'True or False',
  int: 'an integer',
  float: 'a number',
  str: 'a text',
  Any: 'a text, a number, True, False or None',
}
_TUPLE = 'a tuple, such as () or (x,)'


def _describe_hint(hint: Any, word: str | None) -> str:
  kind = _TUPLE if typing.get_origin(hint) is tuple else _KINDS[hint]
  return kind if word is None else f'{kind} or {word!r}'


def _convert_tuple(value: Any, hints: tuple, name: str, most: float | None) -> tuple:
  """Return a list or tuple as a tuple with elements of the right types."""
  if not isinstance(value, list | tuple):
    raise _wrong_type(value, name, _TUPLE)
  if hints[-1] is ...:
    hints = (hints[0],) * len(value)
  if len(hints) != len(value):
    raise _wrong_type(value, name, f'a tuple of {len(hints)} values')
  return tuple(
    convert(element, hint, f'{name}[{index}]', most)
    for index, (element, hint) in enumerate(zip(value, hints, strict=True))
  )


def _check_number(value: Any, name: str, most: float) -> Any:
  if not -most <= value <= most:  # also true for NaN
    is_long = isinstance(value, numbers.Integral) and abs(int(value)) >= 10**18
    shown = '(more than 18 digits)' if is_long else value
    limit = f'{most:,}' if isinstance(most, int) else f'{most:g}'
    raise UserError(f'{name}={shown} must be a finite number of at most {limit}.')
  return value


def _check_text(value: str, name: str) -> str:
  """Check that a text can be the name of a file and can be written to one."""
  try:
    value.encode()
    valid = '\0' not in value
  except UnicodeEncodeError:
    valid = False
  if not valid:
    raise UserError(
      f'{name} contains a null character or an unpaired surrogate, which no file can store as '
      'text. Remove it.'
    )
  return value


def _wrong_type(value: Any, name: str, allowed: str) -> UserError:
  shown = describe_type(value)
  if name.rpartition('.')[2] not in _SECRET and isinstance(value, bool | int | float | str | tuple):
    shown = f'{value!r:.80} ({shown})'
  return UserError(f'{name} must be {allowed}, but got {shown}.')


def describe_type(value: Any) -> str:
  """Return the type of a value for an error message, such as 'a list' or 'None'."""
  if value is None:
    return 'None'
  if isinstance(value, ConfigDict):
    return 'a section'
  name = type(value).__name__
  return f'{"an" if name[0] in "aeiou" else "a"} {name}'
