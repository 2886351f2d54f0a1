"""Mixtures of prompt sets by weight.

A component of a mixture is 'NAME', 'NAME/SPLIT', 'NAME=COPY', 'NAME/SPLIT=COPY' or 'FILE', with
':WEIGHT' behind it: the name of a published set, its split, a local copy of it, or a file of
prompts. A component without a weight has weight 1.
"""

import dataclasses
import fractions
import os
from collections.abc import Sequence

from cai_jax.data.prompt_sources import PromptSource
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import expand_path


@dataclasses.dataclass(frozen=True)
class Component:
  """One source of a mixture.

  Attributes:
    text: the component as the config gives it.
    label: what the metadata of its prompts call it.
    weight: its share relative to the other components, above 0.
    source: the settings with which to load all of its prompts.
  """

  text: str
  label: str
  weight: fractions.Fraction
  source: PromptSource


def parse_mixture(source: PromptSource, sets: Sequence[str]) -> list[Component]:
  """Return the components of a mixture.

  Args:
    source: the settings of the mixture. Those of rows hold for each component.
    sets: names of the published sets.

  Raises:
    UserError: if a component has another form or occurs twice, or a setting has no meaning for a
      mixture.
  """
  for name in ('path', 'name', 'subset', 'field', 'metadata_fields'):
    if getattr(source, name):
      raise UserError(f'{name} has no meaning for a mixture. Remove it.')
  if source.split != 'train':
    raise UserError(
      f'split={source.split!r} has no meaning for a mixture. Name the split in the component, such '
      f"as '{sets[0]}/{source.split}:1'."
    )
  components = [_parse_component(text, source, sets) for text in source.mixture]
  labels = [component.label for component in components]
  for label in labels:
    if labels.count(label) > 1:
      raise UserError(f'mixture: {label!r} occurs twice. Add up its weights.')
  return components


def _parse_component(text: str, mixture: PromptSource, sets: Sequence[str]) -> Component:
  head, colon, weight = text.rpartition(':')
  what = head if colon else text
  place, _, copy = what.partition('=')
  name, _, split = place.partition('/')
  row_settings = dataclasses.replace(mixture, mixture=(), limit=-1, shuffle=False)
  if name in sets:
    source = dataclasses.replace(
      row_settings, source=name, split=split or 'train', path=expand_path(copy) if copy else ''
    )
    return Component(text, place, _parse_weight(text, weight, bool(colon)), source)
  if os.path.splitext(what.lower().removesuffix('.gz'))[1]:
    source = dataclasses.replace(row_settings, source=expand_path(what))
    label = os.path.basename(what).partition('.')[0]
    return Component(text, label, _parse_weight(text, weight, bool(colon)), source)
  raise UserError(
    f"mixture: {text!r} names neither a published set nor a file. Write 'NAME:WEIGHT', "
    f"'NAME/SPLIT=COPY:WEIGHT' or 'FILE:WEIGHT', with a name of {', '.join(sets)}."
  )


def _parse_weight(text: str, weight: str, is_given: bool) -> fractions.Fraction:
  try:
    value = fractions.Fraction(weight) if is_given else fractions.Fraction(1)
  except (ValueError, ZeroDivisionError):
    value = fractions.Fraction(0)
  if not 0 < value <= 10**9:
    raise UserError(f'mixture: the weight of {text!r} must be a number above 0, such as 1 or 0.5.')
  return value


def count_draws(
  sizes: Sequence[int], weights: Sequence[fractions.Fraction], limit: int
) -> list[int]:
  """Return how many prompts to draw from each component.

  Component i gets limit · wᵢ / Σw prompts, rounded down. Those that remain go to the largest
  remainders, the earlier component first (Hamilton's method).

  Args:
    sizes: number of prompts of each component, at least 1.
    weights: weight of each component, above 0.
    limit: number of prompts of the mixture. -1 means the largest number of which no component's
      share exceeds its size.

  Raises:
    UserError: if a component has too few prompts for the limit.
  """
  if limit != -1:
    counts = _apportion(limit, weights)
    if any(count > size for count, size in zip(counts, sizes, strict=True)):
      raise UserError(
        f'mixture: limit={limit} needs {counts} prompts of its components, which have '
        f'{list(sizes)}. Lower the limit to {_largest(sizes, weights)}, or change the weights.'
      )
    return counts
  return _apportion(_largest(sizes, weights), weights)


def _largest(sizes: Sequence[int], weights: Sequence[fractions.Fraction]) -> int:
  """Return the largest number of prompts of which no component's share exceeds its size."""
  total = sum(weights)
  return min(int(size * total / weight) for size, weight in zip(sizes, weights, strict=True))


def _apportion(number: int, weights: Sequence[fractions.Fraction]) -> list[int]:
  total = sum(weights)
  exact = [number * weight / total for weight in weights]
  counts = [int(share) for share in exact]
  by_remainder = sorted(range(len(weights)), key=lambda i: (counts[i] - exact[i], i))
  for i in by_remainder[: number - sum(counts)]:
    counts[i] += 1
  return counts
