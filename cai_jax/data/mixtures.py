"""Mixtures of prompt sets by weight.

A component of a mixture is 'NAME', 'NAME/PART', 'NAME=COPY', 'NAME/PART=COPY' or 'FILE', with
':WEIGHT' behind it: the name of a published set; its split, its subset or 'SUBSET/SPLIT'; a local
copy of it; or a file of prompts. A component without a weight has weight 1.
"""

import dataclasses
import fractions
import itertools
import os
import re
from collections.abc import Mapping, Sequence

from cai_jax.data.prompt_sources import PromptSource
from cai_jax.data.sets import PromptSet
from cai_jax.runtime.cloud.copies import local_path
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


def parse_mixture(source: PromptSource, sets: Mapping[str, PromptSet]) -> list[Component]:
  """Return the components of a mixture.

  Args:
    source: the settings of the mixture. Those of rows hold for each component.
    sets: the published sets by name.

  Raises:
    UserError: if a component has another form, two components are the same or have one label, or a
      setting has no meaning for a mixture.
  """
  for name in ('path', 'name', 'subset', 'field', 'metadata_fields'):
    if getattr(source, name):
      raise UserError(f'{name} has no meaning for a mixture. Remove it.')
  if source.split != 'train':
    raise UserError(
      f'split={source.split!r} has no meaning for a mixture. Name the split in the component, such '
      f"as '{next(iter(sets))}/{source.split}:1'."
    )
  components = [_parse_component(text, source, sets) for text in source.mixture]
  for first, second in itertools.combinations(components, 2):
    _check_differ(first, second)
  return components


def _check_differ(first: Component, second: Component) -> None:
  """Check that two components have different prompts and different labels."""
  both = f'mixture: {first.text!r} and {second.text!r}'
  if first.source == second.source:
    raise UserError(f'{both} are the same prompts. Keep one of them, with the sum of the weights.')
  if first.label != second.label:
    return
  advice = 'Rename one file.'
  if first.source.source == second.source.source:  # two copies of one published set
    advice = f"Write the split of each, such as '{first.source.source}/SPLIT=COPY', or join them."
  raise UserError(f'{both} would both have the label {first.label!r}. {advice}')


def _parse_component(text: str, mixture: PromptSource, sets: Mapping[str, PromptSet]) -> Component:
  head, colon, weight = text.rpartition(':')
  what = head if colon else text
  place, _, copy = what.partition('=')
  name, _, part = place.partition('/')
  stem, suffix = os.path.splitext(re.sub(r'\.gz$', '', os.path.basename(what), flags=re.IGNORECASE))
  source = dataclasses.replace(mixture, mixture=(), limit=-1, shuffle=False)
  if name in sets:
    subset, split = _choose_part(name, part, sets[name])
    source, label = dataclasses.replace(source, source=name), place
    if copy:
      source = dataclasses.replace(source, path=expand_path(local_path(copy)))
    if not copy or os.path.isdir(source.path):  # of a file, the subset and the split are labels
      source = dataclasses.replace(source, subset=subset, split=split)
  elif suffix:
    source, label = dataclasses.replace(source, source=expand_path(local_path(what))), stem
  else:
    raise UserError(
      f"mixture: {text!r} names neither a published set nor a file. Write 'NAME:WEIGHT', "
      f"'NAME/SPLIT=COPY:WEIGHT' or 'FILE:WEIGHT', with a name of {', '.join(sets)}."
    )
  return Component(text, label, _parse_weight(text, weight, bool(colon)), source)


def _choose_part(name: str, part: str, entry: PromptSet) -> tuple[str, str]:
  """Return the subset and the split that 'SPLIT', 'SUBSET' or 'SUBSET/SPLIT' names."""
  default_subset = entry.subsets[0] if entry.subsets else ''
  parts = {
    f'{subset}/{split}': (subset, split) for subset in entry.subsets for split in entry.splits
  }
  parts |= {subset: (subset, entry.splits[0]) for subset in entry.subsets}
  parts |= {split: (default_subset, split) for split in entry.splits}
  parts[''] = default_subset, entry.splits[0]
  if part not in parts:
    subsets = f', and the subsets {", ".join(entry.subsets)}' if entry.subsets else ''
    raise UserError(
      f'mixture: {name} has no split or subset {part!r}. It has the splits '
      f'{", ".join(entry.splits)}{subsets}.'
    )
  return parts[part]


def _parse_weight(text: str, weight: str, is_given: bool) -> fractions.Fraction:
  try:
    value = fractions.Fraction(weight) if is_given else fractions.Fraction(1)
  except (ValueError, ZeroDivisionError):
    value = fractions.Fraction(0)
  if not 0 < value <= 10**9:
    raise UserError(f'mixture: the weight of {text!r} must be a number above 0, such as 1 or 0.5.')
  return value


def count_draws(
  sizes: Mapping[str, int], weights: Sequence[fractions.Fraction], limit: int
) -> list[int]:
  """Return how many prompts to draw from each component.

  Component i gets limit · wᵢ / Σw prompts, rounded down. Those that remain go to the largest
  remainders, the earlier component first (Hamilton's method).

  Args:
    sizes: label of each component → its number of prompts, at least 1.
    weights: weight of each component, above 0.
    limit: number of prompts of the mixture. -1 means the largest number of which no component's
      share exceeds its size.

  Raises:
    UserError: if a component has too few prompts for the limit, or would give none.
  """
  largest = _largest(list(sizes.values()), weights)
  counts = _apportion(largest if limit == -1 else limit, weights)
  for (label, size), count in zip(sizes.items(), counts, strict=True):
    if count > size:
      raise UserError(
        f'mixture: limit={limit} needs {count} prompts of {label!r}, which has {size}. Lower the '
        f'limit to {largest}, or change the weights.'
      )
  for label, count in zip(sizes, counts, strict=True):
    if not count:
      raise UserError(
        f'mixture: {label!r} would give none of the {sum(counts)} prompts, because its weight is '
        f'too small. Give it a larger weight{"" if limit == -1 else " or raise the limit"}, or '
        'remove it.'
      )
  return counts


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
