"""Units of training: the segments that an objective compares, which packing keeps together.

A supervised example is a unit of one segment. The two sides of a comparison are a unit of two: both
stand in one row, so they are always in the same micro-batch and on the same device.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from cai_jax.data.ragged import Ragged
from cai_jax.runtime.errors import UserError

# Number of segments of a unit of each kind.
# 'sequence': a sequence to imitate.
# 'comparison': the chosen response and the rejected response to one prompt.
# 'judged': a response that was judged on its own, and a response to another prompt under the same
#   prompt, from which an objective can estimate the divergence from the reference.
SEGMENTS = {'sequence': 1, 'comparison': 2, 'judged': 2}

# Least and greatest number of a value, where that is known; every value must be finite.
RANGES = {'probability': (0.0, 1.0), 'desirable': (0.0, 1.0)}

ARRAYS = ('tokens', 'positions', 'segment_ids', 'loss_mask')  # of every batch, i32[B,T] each
LAST_SEGMENTS = 'last_segment_ids'  # i32[B,T], of batches in which segments share tokens


class Example(NamedTuple):
  """One training sequence.

  Attributes:
    tokens: i32[T].
    loss_mask: bool[T], true on the tokens to learn.
    id: id of the row of D_CAI that the example was made from.
  """

  tokens: np.ndarray
  loss_mask: np.ndarray
  id: str = ''


class Unit(NamedTuple):
  """Token sequences that belong together, and what is known about each.

  Attributes:
    segments: the sequences, in the order that their kind defines; see `SEGMENTS`.
    values: by name, one number for each segment, such as the 'probability' that the first segment
      of a comparison is better. Batches have an array f32[B,T] of each name.
    id: names the unit in messages; units with the same id are held out together.
    shared: number of first tokens that a batch holds once for all segments; see `share_prompt`.
  """

  segments: tuple[Example, ...]
  values: Mapping[str, tuple[float, ...]] = MappingProxyType({})
  id: str = ''
  shared: int = 0

  @property
  def length(self) -> int:
    """Number of tokens of all segments, where shared tokens count once."""
    return sum(len(segment.tokens) for segment in self.segments) - self.repeated

  @property
  def repeated(self) -> int:
    """Number of tokens of the segments that a batch leaves out, because they are shared."""
    return self.shared * (len(self.segments) - 1)


def share_prompt(unit: Unit) -> Unit:
  """Return a unit whose segments share their prompt, so that a batch holds it once.

  Segments share their first tokens as far as these are equal, and as far as no segment learns them
  or the token after them. Each segment then begins with a token of its own that is not learned, so
  all tokens to learn are predicted from a token of the same segment.

  Args:
    unit: the unit; each segment has a token to learn.
  """
  first, *others = unit.segments
  count = min(int(segment.loss_mask.argmax()) for segment in unit.segments) - 1
  for other in others:
    differs = first.tokens[: max(count, 0)] != other.tokens[: max(count, 0)]
    count = int(differs.argmax()) if differs.any() else count
  return unit._replace(shared=max(count, 0))


@functools.singledispatch
def share_prompts(units: Sequence[Unit]) -> Sequence[Unit]:
  """Return units whose segments share their prompt; see `share_prompt`.

  Args:
    units: the units.
  """
  return tuple(map(share_prompt, units))


@functools.singledispatch
def add_values(units: Sequence[Unit], name: str, numbers: Sequence[Sequence[float]]) -> Any:
  """Return units with another value.

  Args:
    units: the units.
    name: the name of the value.
    numbers: for each unit, a number for each of its segments.
  """
  return tuple(
    unit._replace(values={**unit.values, name: tuple(own)})
    for unit, own in zip(units, numbers, strict=True)
  )


def as_unit(item: Example | Unit) -> Unit:
  """Return an example as a unit of one segment, and a unit as it is.

  Args:
    item: an example or a unit.
  """
  return Unit((item,), id=item.id) if isinstance(item, Example) else item


# What is asked of all items of a collection. `UnitTable` answers from its arrays.


@functools.singledispatch
def unit_lengths(items: Sequence[Example | Unit]) -> Sequence[int] | np.ndarray:
  """Return the number of tokens that each example or unit takes in a row.

  Args:
    items: examples or units.
  """
  return [as_unit(item).length for item in items]


@functools.singledispatch
def segment_lengths(items: Sequence[Example | Unit]) -> Ragged:
  """Return the number of tokens of each segment of each example or unit.

  Args:
    items: examples or units.
  """
  units = [as_unit(item) for item in items]
  sizes = [len(segment.tokens) for unit in units for segment in unit.segments]
  return Ragged.of_lengths(np.array(sizes, np.int64), [len(unit.segments) for unit in units])


@functools.singledispatch
def shared_counts(items: Sequence[Example | Unit]) -> np.ndarray:
  """Return how many first tokens the segments of each example or unit share.

  Args:
    items: examples or units.
  """
  return np.array([as_unit(item).shared for item in items], np.int64)


@functools.singledispatch
def item_ids(items: Sequence[Any]) -> list[str]:
  """Return the id of each item.

  Args:
    items: examples, units, or other items with an `id`.
  """
  return [item.id for item in items]


@functools.singledispatch
def choose_items(items: Sequence[Any], indices: Sequence[int]) -> Sequence[Any]:
  """Return chosen items in a given order.

  Args:
    items: examples, units, or other items.
    indices: their indices.
  """
  return tuple(items[i] for i in indices)


@functools.singledispatch
def check_units(
  items: Sequence[Example | Unit],
  kind: str,
  needed: Sequence[str] = (),
  names: Iterable[str] | None = None,
) -> None:
  """Check that units are those that an objective trains on.

  Args:
    items: examples or units.
    kind: the kind of unit that the objective needs, a key of `SEGMENTS`.
    needed: names of values that the objective reads.
    names: names of the values that the units must have; None means those of the first one.

  Raises:
    UserError: if a unit has another number of segments, another set of values than the first one,
      lacks a value that is needed, or has a value with another number of entries than segments, or
      outside its range; or if a segment that is compared has no token to learn.
  """
  check_each(items, kind, needed, names)


def check_each(
  items: Sequence[Example | Unit],
  kind: str,
  needed: Sequence[str] = (),
  names: Iterable[str] | None = None,
) -> None:
  """Do what `check_units` does, one unit after the other."""
  if names is None:
    names = as_unit(items[0]).values if len(items) else ()
  names = set(names)
  for number, item in enumerate(items):
    unit = as_unit(item)
    name = unit.id or f'unit {number}'
    if len(unit.segments) != SEGMENTS[kind]:
      raise UserError(
        f'{name} has {len(unit.segments)} segments, but the objective needs units of the kind '
        f'{kind!r}, which have {SEGMENTS[kind]}.'
      )
    if missing := [value for value in needed if value not in unit.values]:
      raise UserError(
        f'{name} has no value {missing[0]!r}, which the objective needs with these options. Build '
        'the units with it, or change the options.'
      )
    if set(unit.values) != names or names & {*ARRAYS, LAST_SEGMENTS}:
      raise UserError(
        f'{name} has the values {sorted(unit.values)}. All units need the same ones, here '
        f'{sorted(names)}, and none may be called like an array of a batch: '
        f'{(*ARRAYS, LAST_SEGMENTS)}.'
      )
    _check_values(unit, name)
    if kind != 'sequence':
      _check_segments(unit, name)


def _check_values(unit: Unit, name: str) -> None:
  """Check that each value has one number for each segment, within its range."""
  for value, numbers in unit.values.items():
    if len(numbers) != len(unit.segments):
      raise UserError(
        f'{name}: {value!r} has {len(numbers)} numbers for {len(unit.segments)} segments.'
      )
    least, most = RANGES.get(value, (-math.inf, math.inf))
    if not all(math.isfinite(x) and least <= x <= most for x in numbers):
      allowed = f'in [{least:g}, {most:g}]' if value in RANGES else 'finite'
      raise UserError(f'{name}: {value!r} is {tuple(numbers)}. Each number must be {allowed}.')


def _check_segments(unit: Unit, name: str) -> None:
  """Check that each segment has a token to learn; its first token cannot be predicted."""
  for number, segment in enumerate(unit.segments):
    if not segment.loss_mask[1:].any():
      raise UserError(
        f'{name}: segment {number} of {len(segment.tokens)} tokens has no token to learn after its '
        'first one. Leave the unit out.'
      )
