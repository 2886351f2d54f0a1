"""The types of rotary scaling in config.json: the entries of each, read and written.

`TYPES` is the table. `cai_jax.model.families.rope` finds the objects that hold a scaling.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from cai_jax.model.families.fields import is_number, read_flag, read_number, read_size, require
from cai_jax.model.rope import (
  DynamicRope,
  LinearRope,
  Llama3Rope,
  LongRope,
  ProportionalRope,
  RopeScaling,
  YarnRope,
)
from cai_jax.runtime.errors import UserError, show

FRACTION = 'partial_rotary_factor'
ORIGINAL = 'original_max_position_embeddings'
WHOLE = 'max_position_embeddings'


def _read_factors(entries: Mapping[str, Any], key: str) -> tuple[float, ...]:
  """Return a list of positive numbers."""
  value = entries.get(key)
  if not isinstance(value, list) or not all(is_number(x) and x > 0 for x in value):
    raise UserError(f'config.json: {key} is {show(value)}; it must be a list of positive numbers.')
  return tuple(map(float, value))


class _Field(NamedTuple):
  """An entry of a type of scaling: its name, the field of the class, and the reader."""

  entry: str
  name: str
  read: Callable[[Mapping[str, Any], str], Any] = read_number


_FACTOR = _Field('factor', 'factor')
_ORIGINAL = _Field(ORIGINAL, 'original_max_positions', read_size)


def _fields(*names: str) -> tuple[_Field, ...]:
  """Return fields that are numbers and have the names of their entries."""
  return tuple(_Field(name, name) for name in names)


# Type in config.json → its class, and its entries except those that all types have.
TYPES: dict[str, tuple[type, tuple[_Field, ...]]] = {
  'linear': (LinearRope, (_FACTOR,)),
  'dynamic': (DynamicRope, (_FACTOR,)),
  'llama3': (Llama3Rope, (*_fields('factor', 'low_freq_factor', 'high_freq_factor'), _ORIGINAL)),
  'yarn': (
    YarnRope,
    (
      _FACTOR,
      _ORIGINAL,
      *_fields('beta_fast', 'beta_slow', 'attention_factor', 'mscale', 'mscale_all_dim'),
      _Field('truncate', 'truncate', read_flag),
    ),
  ),
  'longrope': (
    LongRope,
    (
      _Field('short_factor', 'short_factors', _read_factors),
      _Field('long_factor', 'long_factors', _read_factors),
      _ORIGINAL,
      *_fields('factor', 'attention_factor'),
    ),
  ),
  'proportional': (ProportionalRope, (_Field(FRACTION, 'fraction'), _FACTOR)),
}
_NAMES = {cls: name for name, (cls, _) in TYPES.items()}
_COMMON = ('rope_type', 'type', 'rope_theta', FRACTION)
# Transformers sets these entries for the types that need the original context.
_WITH_DEFAULT_ORIGINAL = (YarnRope, LongRope)


def read_scaling(
  hf: Mapping[str, Any], key: str, kind: str, theta: float, half: int
) -> RopeScaling | None:
  """Return the scaling that one entry describes; None means that there is none.

  Args:
    hf: a parsed config.json.
    key: name of the entry.
    kind: its type.
    theta: base of the frequencies.
    half: number of frequencies.

  Raises:
    UserError: if the type is not implemented, or an entry is unknown, missing or wrong.
  """
  rope = hf[key]
  if kind not in TYPES and kind != 'default':
    raise UserError(
      f'config.json: {key} has rope_type {show(kind)}, which is not supported; '
      f'{", ".join(map(repr, ("default", *TYPES)))} are.'
    )
  cls, fields = TYPES.get(kind, (None, (_FACTOR, _ORIGINAL)))
  known = {*_COMMON, *(field.entry for field in fields)}
  if unknown := sorted(k for k in rope.keys() - known if rope[k] is not None):
    raise UserError(
      f'config.json: {key}.{unknown[0]}={show(rope[unknown[0]])} is not supported for rope_type '
      f'{show(kind)}, whose entries are {", ".join(sorted(known))}. Remove it if it has no effect.'
    )
  if cls is None:
    require(rope, 'factor', 1.0)
    return None
  values = _read_values(hf, key, kind, cls, fields)
  if cls is LongRope:
    values['max_positions'] = read_size(hf, WHOLE)
    for name in ('short_factors', 'long_factors'):
      if len(values[name]) != half:
        raise UserError(
          f'config.json: {key}.{name[:-1]} has {len(values[name])} numbers for {half} frequencies. '
          'It must have one for each.'
        )
  if cls is YarnRope and theta <= 1:
    raise UserError(f'config.json: rope_theta is {theta}; for rope_type {kind!r} it must exceed 1.')
  try:
    return cls(**values)
  except UserError as error:
    raise UserError(f'config.json: {key}: {error}') from None


def _read_values(
  hf: Mapping[str, Any], key: str, kind: str, cls: type, fields: Sequence[_Field]
) -> dict[str, Any]:
  """Return the fields of a class of scalings."""
  rope, values = dict(hf[key]), {}
  if any(field.entry == ORIGINAL for field in fields):
    # Phi-3 and transformers 4 state the original context beside the object.
    stated = {ORIGINAL: hf.get(ORIGINAL), f'{key}.{ORIGINAL}': rope.get(ORIGINAL)}
    given = {name: read_size(stated, name) for name, x in stated.items() if x is not None}
    if len(set(given.values())) > 1:
      raise UserError(
        f'config.json: {ORIGINAL}={given[ORIGINAL]} contradicts {rope[ORIGINAL]} in {key}. Remove '
        'one.'
      )
    rope[ORIGINAL] = next(iter(given.values()), None)
    if rope[ORIGINAL] is None and cls in _WITH_DEFAULT_ORIGINAL:
      rope[ORIGINAL] = read_size(hf, WHOLE)
  required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
  missing = [f.entry for f in fields if f.name in required and rope.get(f.entry) is None]
  if missing:
    needed = ', '.join(f.entry for f in fields if f.name in required)
    raise UserError(
      f'config.json: rope_type {kind!r} needs {needed}; {", ".join(missing)} is missing in {key}.'
    )
  dotted = {f'{key}.{entry}': value for entry, value in rope.items()}
  for field in fields:
    if rope.get(field.entry) is not None:
      values[field.name] = field.read(dotted, f'{key}.{field.entry}')
  return values


def write_scaling(scaling: RopeScaling) -> dict[str, Any]:
  """Return the object that `read_scaling` reads, without entries that have their default.

  Args:
    scaling: the scaling.
  """
  name = _NAMES[type(scaling)]
  defaults = {field.name: field.default for field in dataclasses.fields(scaling)}  # type: ignore[arg-type]
  hf: dict[str, Any] = {'rope_type': name}
  for field in TYPES[name][1]:
    value = getattr(scaling, field.name)
    if value != defaults[field.name]:
      hf[field.entry] = list(value) if isinstance(value, tuple) else value
  return hf
