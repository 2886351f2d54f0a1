"""Check values from JSON files against the shape that their reader expects.

A shape is

- `str`, `int`, `float` or `object` (anything). A float may be an integer, an int may not be a bool,
  and no finite number may exceed `LARGEST`;
- `None`, or a tuple of alternative shapes;
- a list with the shape of every item;
- a dict with the shapes of its keys. All of them are required, except those marked as
  `optional('key')`. The key `...` has the shape of every other key.

The content of a damaged or foreign file thus becomes an error that names the file and the key,
before anything computes with it.
"""

import math
from typing import Any, NamedTuple

from cai_jax.runtime.errors import UserError, show

LARGEST = 1e300  # so that computing with numbers overflows nothing

Shape = Any


class optional(NamedTuple):
  """A key that a dict may lack."""

  key: str


def check_shape(value: Any, shape: Shape, place: str) -> None:
  """Check that a value has a shape.

  Args:
    value: a value from a JSON file.
    shape: the shape, see above.
    place: the file, and the line if it has lines, for the error message.

  Raises:
    UserError: if it does not; the message names the place, the key and what belongs there.
  """
  if problem := _find_problem(value, shape, ''):
    path, found, expected = problem
    where = f'{place}: {path}' if path else place
    raise UserError(
      f'{where} is {show(found, 60)}, but it must be {expected}. The file is damaged or another '
      'program wrote it: restore it, or run the stage that writes it in a new workdir.'
    )


def _find_problem(value: Any, shape: Shape, path: str) -> tuple[str, Any, str] | None:
  """Return the path, value and description of the first place that has the wrong shape."""
  if isinstance(shape, tuple):
    problems = [_find_problem(value, alternative, path) for alternative in shape]
    deepest = max((p for p in problems if p), key=lambda p: len(p[0]), default=None)
    return None if None in problems else deepest
  if isinstance(shape, list):
    if not isinstance(value, list):
      return path, value, 'a list'
    items = ((f'{path}[{i}]', item, shape[0]) for i, item in enumerate(value))
  elif isinstance(shape, dict):
    if not isinstance(value, dict):
      return path, value, 'an object'
    known = {key.key if isinstance(key, optional) else key: key for key in shape}
    for name, key in known.items():
      if isinstance(key, str) and name not in value:
        return path, value, f'an object with the key {name!r}'
    items = (
      (f'{path}.{name}' if path else name, item, shape[known[name if name in known else ...]])
      for name, item in value.items()
      if name in known or ... in known
    )
  else:
    return None if _is_a(value, shape) else (path, value, _NAMES[shape])
  return next(filter(None, (_find_problem(v, s, p) for p, v, s in items)), None)


_NAMES = {str: 'a text', int: 'a whole number', float: 'a number', None: 'null'}


def _is_a(value: Any, shape: Shape) -> bool:
  if shape is object:
    return True
  if shape is None:
    return value is None
  if shape is str:
    return isinstance(value, str)
  if isinstance(value, bool) or not isinstance(value, int if shape is int else int | float):
    return False
  return abs(value) <= LARGEST or (isinstance(value, float) and not math.isfinite(value))
