"""Rotary positions in config.json, which transformers 4 and 5 store in different entries.

Transformers 5 stores `rope_parameters`: one object, or one for each type of layers. Earlier
versions store base, rotated fraction and scaling separately, the scaling in `rope_scaling`. A file
may contain all of them if they say the same.

A family describes its entries by a `RopeEntries`. `read_rope` and `write_rope` are for families
with the same rotary positions in all layers, `read_layer_ropes` and `write_layer_ropes` for those
whose layers of different types differ, and `read_no_rope_layers` and `write_no_rope_layers` for
those in which some layers rotate nothing.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cai_jax.model.config import ModelConfig
from cai_jax.model.families.fields import read_number, read_size, require
from cai_jax.model.families.rope_scalings import (
  FRACTION,
  ORIGINAL,
  WHOLE,
  read_scaling,
  write_scaling,
)
from cai_jax.model.rope import LongRope, ProportionalRope, Rope
from cai_jax.runtime.errors import UserError, show

THETA = 10_000.0  # transformers' base if config.json gives none
OBJECTS = ('rope_parameters', 'rope_scaling')
ROPE_ENTRIES = (*OBJECTS, 'rope_theta')  # which transformers 4 and 5 have for all families


@dataclasses.dataclass(frozen=True)
class RopeEntries:
  """How a family's config.json states rotary positions.

  Attributes:
    theta: base of the frequencies if config.json gives none.
    theta_key: the base's entry beside `rope_parameters`.
    fraction: fraction of a head's channels that are rotated if config.json gives none; None if the
      family rotates all channels, and another fraction is an error.
    fraction_key: the fraction's entry beside `rope_parameters`.
    objects: the entries that can hold a scaling.
    aliases: the family's other names of types of scaling, such as {'su': 'longrope'}.
  """

  theta: float = THETA
  theta_key: str = 'rope_theta'
  fraction: float | None = None
  fraction_key: str = FRACTION
  objects: tuple[str, ...] = OBJECTS
  aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)


LLAMA_ENTRIES = RopeEntries()


# Reading.


def read_rope(
  hf: Mapping[str, Any], head_dim: int, entries: RopeEntries = LLAMA_ENTRIES
) -> dict[str, Any]:
  """Return `rope_theta`, `rope_scaling` and `rope_channels` of ModelConfig.

  With longrope scaling, also return `max_positions`, which is the original context.

  Args:
    hf: a parsed config.json.
    head_dim: channels of a head.
    entries: how the family states rotary positions.

  Raises:
    UserError: if two entries contradict each other, the type of scaling is not implemented, or a
      number is missing or wrong.
  """
  rope = _read_rope(hf, head_dim, entries)
  return {
    'rope_theta': rope.theta,
    'rope_scaling': rope.scaling,
    'rope_channels': rope.channels,
    **_limit([rope]),
  }


def read_layer_ropes(
  hf: Mapping[str, Any],
  head_dim: int,
  kinds: Sequence[str],
  entries: Mapping[str, RopeEntries],
) -> dict[str, Any]:
  """Return the fields of ModelConfig for layers whose rotary positions depend on their type.

  `rope_parameters` has an object for each type. The entries of transformers 4 that hold for a type
  are those of its `RopeEntries`.

  Args:
    hf: a parsed config.json.
    head_dim: channels of a head.
    kinds: type of each layer, such as 'full_attention'.
    entries: how the family states the rotary positions of each type. `objects` may contain
      'rope_scaling' if it holds for the type; `rope_parameters` is understood.

  Returns:
    `ropes`, or the fields of `read_rope` if all layers have the same.

  Raises:
    UserError: as `read_rope`.
  """
  nested = hf.get('rope_parameters') or {}
  if not isinstance(nested, dict) or not nested.keys() <= entries.keys():
    wrong = next((key for key in nested if key not in entries), '') if nested else ''
    raise UserError(
      f'config.json: rope_parameters{wrong and "." + str(wrong)} is not supported: rope_parameters '
      f'of this model_type must have an object for each of {", ".join(entries)}, and nothing else.'
    )
  ropes = {}
  for kind in dict.fromkeys(kinds):
    key = f'rope_parameters.{kind}'
    own = dataclasses.replace(
      entries[kind], objects=(key, *(o for o in entries[kind].objects if o == 'rope_scaling'))
    )
    ropes[kind] = _read_rope({**hf, key: nested.get(kind)}, head_dim, own)
  layers = tuple(ropes[kind] for kind in kinds)
  if len(set(layers)) > 1:
    return {'ropes': layers, **_limit(layers)}
  rope = layers[0]
  fields = {'rope_theta': rope.theta, 'rope_scaling': rope.scaling, 'rope_channels': rope.channels}
  return fields | _limit(layers)


def read_no_rope_layers(
  hf: Mapping[str, Any], rope: Rope, layers: int, interval: int | None = None
) -> tuple[Rope | None, ...]:
  """Return `ropes` of ModelConfig for a family in which some layers rotate nothing (SmolLM3).

  Args:
    hf: a parsed config.json. `no_rope_layers` has a 1 for each layer that rotates, and a 0 for
      each that does not. As in transformers, entries beyond the last layer have no effect.
    rope: rotary positions of the layers that rotate.
    layers: number of layers.
    interval: without `no_rope_layers`, each layer whose number from 1 is a multiple of
      `no_rope_layer_interval` rotates nothing. This is that entry's default; None means that all
      layers rotate.

  Returns:
    The rotary positions of each layer, or () if all layers rotate.

  Raises:
    UserError: if an entry is wrong.
  """
  rotates = hf.get('no_rope_layers')
  if rotates is None:
    every = layers + 1 if interval is None else read_size(hf, 'no_rope_layer_interval', interval)
    rotates = [int(bool((layer + 1) % every)) for layer in range(layers)]
  good = isinstance(rotates, list) and all(type(x) in (int, bool) and x in (0, 1) for x in rotates)
  if not good or len(rotates) < layers:
    raise UserError(
      f'config.json: no_rope_layers is {show(rotates)}; it must be a list of at least {layers} '
      'entries, which are 1 for a layer that rotates and 0 for one that does not.'
    )
  rotates = rotates[:layers]
  return () if all(rotates) else tuple(rope if x else None for x in rotates)


def _limit(ropes: Sequence[Rope]) -> dict[str, int]:
  """Return `max_positions` if a scaling limits it."""
  contexts = [rope.scaling.context for rope in ropes if isinstance(rope.scaling, LongRope)]
  return {'max_positions': min(contexts)} if contexts else {}


def _read_rope(hf: Mapping[str, Any], head_dim: int, entries: RopeEntries) -> Rope:
  """Return the rotary positions that the entries of config.json describe."""
  keys = [key for key in entries.objects if hf.get(key)]
  # The types are compared first: one of them may not be implemented.
  kinds = [_read_type(hf, key, entries) for key in keys]
  theta = _read_theta(hf, entries)
  channels = _read_channels(hf, head_dim, keys, kinds, entries)
  readings: list[Any] = kinds
  if len(set(kinds)) < 2:
    half = (channels or head_dim) // 2
    readings = [
      read_scaling(hf, key, kind, theta, half) for key, kind in zip(keys, kinds, strict=True)
    ]
  if len(set(readings)) > 1:
    first, second = keys[1], keys[0]
    raise UserError(
      f'config.json: {first}={show(hf[first], 200)} contradicts {second}='
      f'{show(hf[second], 200)}. Remove the one that the model was not trained with.'
    )
  return Rope(theta, next(iter(readings), None), channels)


def _read_theta(hf: Mapping[str, Any], entries: RopeEntries) -> float:
  """Return the base of the rotary frequencies, which several entries can state."""
  thetas = _collect(hf, entries, entries.theta_key, 'rope_theta', read_number)
  return _agree(thetas, entries.theta)


def _read_channels(
  hf: Mapping[str, Any],
  head_dim: int,
  keys: Sequence[str],
  kinds: Sequence[str],
  entries: RopeEntries,
) -> int | None:
  """Return the number of rotated channels, None if all are, from the fraction of config.json."""
  if 'proportional' in kinds:
    return None  # its fraction is part of the scaling
  if entries.fraction is None:
    require(hf, entries.fraction_key, 1.0)
    for key in keys:
      require(hf[key], FRACTION, 1.0)
    return None
  fractions = _collect(hf, entries, entries.fraction_key, FRACTION, read_number)
  fraction = _agree(fractions, entries.fraction)
  channels = int(head_dim * fraction)
  if fraction > 1 or channels < 2 or channels % 2:
    raise UserError(
      f'config.json: {next(iter(fractions), entries.fraction_key)}={fraction} rotates {channels} '
      f'of the {head_dim} channels of a head. The number must be even, positive and at most '
      f'{head_dim}.'
    )
  return None if channels == head_dim else channels


def _collect(
  hf: Mapping[str, Any],
  entries: RopeEntries,
  key: str,
  name: str,
  read: Callable[[Mapping[str, Any], str], float],
) -> dict[str, float]:
  """Return each statement of a number: by `key` in config.json, or by `name` in an object."""
  stated = {key: hf.get(key)}
  stated |= {f'{o}.{name}': hf[o].get(name) for o in entries.objects if hf.get(o)}
  return {key: read(stated, key) for key, value in stated.items() if value is not None}


def _agree(stated: Mapping[str, float], default: float) -> float:
  """Return the number that all statements give."""
  if len(set(stated.values())) > 1:
    both = ', '.join(f'{key}={value}' for key, value in stated.items())
    raise UserError(
      f'config.json: {both} contradict each other. Remove the one that the model was not trained '
      'with.'
    )
  return next(iter(stated.values()), default)


def _read_type(hf: Mapping[str, Any], key: str, entries: RopeEntries) -> str:
  """Return the type of scaling that one entry names, whether it is implemented or not."""
  rope = hf[key]
  if not isinstance(rope, dict):
    raise UserError(
      f'config.json: {key} is {show(rope)}; it must be an object such as '
      '{"rope_type": "default"}.'
    )
  kinds = {name: rope[name] for name in ('rope_type', 'type') if rope.get(name) is not None}
  for kind in kinds.values():
    if not isinstance(kind, str):
      raise UserError(f'config.json: {key} has rope_type {show(kind)}; it must be a name.')
  kinds = {name: entries.aliases.get(kind, kind) for name, kind in kinds.items()}
  if len(set(kinds.values())) == 2:
    raise UserError(
      f'config.json: {key} has rope_type={show(kinds["rope_type"])} and '
      f'type={show(kinds["type"])}, which contradict each other. Remove one of them.'
    )
  return next(iter(kinds.values()), 'default')


# Writing.


def write_rope(config: ModelConfig, entries: RopeEntries = LLAMA_ENTRIES) -> dict[str, Any]:
  """Return the entries of config.json that `read_rope` reads, for transformers 4 and 5.

  Args:
    config: the model.
    entries: as for `read_rope`.
  """
  rope = Rope(config.rope_theta, config.rope_scaling, config.rope_channels)
  fraction = _write_fraction(rope, config.head_dim, entries)
  hf: dict[str, Any] = {entries.theta_key: rope.theta}
  if fraction is not None:
    hf[entries.fraction_key] = fraction
  hf['rope_parameters'] = _write_parameters(rope, fraction)
  if rope.scaling is not None:
    hf['rope_scaling'] = write_scaling(rope.scaling)
  return hf | _write_contexts([rope])


def write_layer_ropes(
  config: ModelConfig, kinds: Sequence[str], entries: Mapping[str, RopeEntries]
) -> dict[str, Any]:
  """Return the entries of config.json that `read_layer_ropes` reads, for transformers 4 and 5.

  Args:
    config: the model.
    kinds: type of each layer.
    entries: as for `read_layer_ropes`.
  """
  hf: dict[str, Any] = {'rope_parameters': {}}
  ropes: list[Rope] = []
  for layer, kind in enumerate(kinds):
    rope = config.rope(layer)
    if rope is None or kind in hf['rope_parameters']:
      continue
    fraction = _write_fraction(rope, config.head_dim, entries[kind])
    hf['rope_parameters'][kind] = _write_parameters(rope, fraction)
    hf[entries[kind].theta_key] = rope.theta
    if fraction is not None:
      hf[entries[kind].fraction_key] = fraction
    if rope.scaling is not None and 'rope_scaling' in entries[kind].objects:
      hf['rope_scaling'] = write_scaling(rope.scaling)
    ropes.append(rope)
  return hf | _write_contexts(ropes)


def write_no_rope_layers(config: ModelConfig) -> dict[str, Any]:
  """Return the entry of config.json that `read_no_rope_layers` reads."""
  layers = range(config.num_layers)
  return {'no_rope_layers': [int(config.rope(layer) is not None) for layer in layers]}


def _write_parameters(rope: Rope, fraction: float | None) -> dict[str, Any]:
  """Return an object of `rope_parameters`."""
  base: dict[str, Any] = {'rope_type': 'default', 'rope_theta': rope.theta}
  if fraction is not None:
    base[FRACTION] = fraction
  return base if rope.scaling is None else base | write_scaling(rope.scaling)


def _write_fraction(rope: Rope, head_dim: int, entries: RopeEntries) -> float | None:
  """Return the rotated fraction, None for a family that always rotates all channels."""
  if entries.fraction is None or isinstance(rope.scaling, ProportionalRope):
    return None
  channels = head_dim if rope.channels is None else rope.channels
  fraction = channels / head_dim
  # Readers round the product down.
  return fraction if int(head_dim * fraction) == channels else math.nextafter(fraction, 1.0)


def _write_contexts(ropes: Sequence[Rope]) -> dict[str, Any]:
  """Return the two contexts of longrope, where Phi-3 and transformers 4 read them."""
  for rope in ropes:
    if isinstance(rope.scaling, LongRope):
      return {WHOLE: rope.scaling.max_positions, ORIGINAL: rope.scaling.original_max_positions}
  return {}
