"""Typed entries of a JSON object such as config.json: each has the right type and size, or fails.

An entry that is null counts as absent, as in transformers.
"""

import math
from collections.abc import Mapping
from typing import Any

from cai_jax.runtime.errors import UserError, show

# Far beyond any model. It keeps a damaged config.json from making us build or allocate it.
LARGEST = 2**31 - 1
MOST_LAYERS = 10_000


def read_size(
  entries: Mapping[str, Any],
  key: str,
  default: int | None = None,
  largest: int = LARGEST,
  smallest: int = 1,
) -> int:
  """Return an integer.

  Args:
    entries: a parsed config.json.
    key: name of the entry.
    default: value of an absent entry; None makes the entry required.
    largest: the largest allowed value.
    smallest: the smallest allowed value.

  Raises:
    UserError: if the entry is not an integer between `smallest` and `largest`.
  """
  value = entries.get(key)
  if value is None and default is not None:
    return default
  if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value <= largest:
    kind = 'a positive integer' if smallest == 1 else f'an integer of at least {smallest}'
    raise UserError(f'config.json: {key} is {show(value)}; it must be {kind}, at most {largest}.')
  return value


def read_number(entries: Mapping[str, Any], key: str, default: float | None = None) -> float:
  """Return a finite positive number as a float.

  Args:
    entries: a parsed config.json, or an object in it.
    key: name of the entry.
    default: value of an absent entry; None makes the entry required.

  Raises:
    UserError: if the entry is not a finite positive number.
  """
  value = entries.get(key)
  if value is None and default is not None:
    return default
  if value is None or not is_number(value) or not value > 0:
    raise UserError(f'config.json: {key} is {show(value)}; it must be a positive number.')
  return float(value)


def read_flag(entries: Mapping[str, Any], key: str, default: bool = False) -> bool:
  """Return a truth value.

  Args:
    entries: a parsed config.json.
    key: name of the entry.
    default: value of an absent entry.

  Raises:
    UserError: if the entry is neither true nor false.
  """
  value = entries.get(key)
  if value is None:
    return default
  if not isinstance(value, bool):
    raise UserError(f'config.json: {key} is {show(value)}; it must be true or false.')
  return value


def is_number(value: Any) -> bool:
  """Whether a JSON value is a finite number that a float can hold; true and false are not."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    return False
  return abs(value) < 1e308 and math.isfinite(value)


def require(entries: Mapping[str, Any], key: str, *allowed: Any) -> None:
  """Check that an option is absent or has an implemented value.

  Args:
    entries: a parsed config.json, or an object in it.
    key: name of the option.
    allowed: the implemented values.

  Raises:
    UserError: if the option has another value.
  """
  value = entries.get(key)
  # 1 equals True and 0 equals False in Python.
  same = any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in allowed)
  if value is not None and not same:
    names = ' or '.join(repr(v) for v in allowed) or 'its absence'
    raise UserError(f'config.json: {key}={show(value)} is not supported; only {names} is.')
