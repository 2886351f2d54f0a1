"""Load the four prompt sets of a run."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from cai_jax.data.near_duplicates import find_near_duplicates
from cai_jax.data.prompts import Prompt, PromptSource, check_disjoint, find_same, load_prompts
from cai_jax.data.sets import PROMPT_SETS
from cai_jax.pipeline.sections import PromptSets
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.terminal import say

NAMES = tuple(field.name for field in dataclasses.fields(PromptSets))
TRAINING = ('harmful', 'helpful')
HELD_OUT = ('eval_harmful', 'eval_helpful')


class LoadedSets(NamedTuple):
  """The prompts of a run, and how many were left out.

  Attributes:
    prompts: the prompts by set.
    near_duplicates: for each training set the number of prompts that were left out because they are
      near-duplicates of held-out ones, or the same.
    repeats: the number that were left out because 'harmful' has them too ('helpful'), or
      'eval_harmful' ('eval_helpful').
  """

  prompts: dict[str, list[Prompt]]
  near_duplicates: dict[str, int]
  repeats: dict[str, int]


def load_prompt_sets(config: PromptSets, seed: int) -> LoadedSets:
  """Load the prompts of each set; a set without a source is empty.

  Args:
    config: the sources.
    seed: seed of the run, for shuffling and for the prompts of the embedded world.

  Raises:
    UserError: if a source cannot be read, two prompts have the same id, or a held-out prompt occurs
      among the training prompts of a file.
  """
  sets = {name: _load_prompts(name, getattr(config, name), seed) for name in NAMES}
  repeats = {}
  for first, second in (TRAINING, HELD_OUT):
    kept = _leave_out_repeats(first, second, sets, config)
    repeats[second] = len(sets[second]) - len(kept)
    sets[second] = kept
    _check_unique_ids(sets, (first, second), config)
  chosen = [name for name in TRAINING if not _is_derived(getattr(config, name))]
  check_held_out([prompt for name in chosen for prompt in sets[name]], sets)
  near_duplicates = {}
  for name in TRAINING:
    kept = _leave_out_near_duplicates(name, sets, config)
    near_duplicates[name] = len(sets[name]) - len(kept)
    sets[name] = kept
  return LoadedSets(sets, near_duplicates, repeats)


def _is_derived(source: PromptSource) -> bool:
  """Return whether no user wrote the list of a source's prompts, and so can remove one from it."""
  return bool(source.mixture or source.expand or source.source in PROMPT_SETS)


def _leave_out_repeats(
  first: str, second: str, sets: Mapping[str, list[Prompt]], config: PromptSets
) -> list[Prompt]:
  """Return the second set, without the first one's prompts if nobody can edit the second."""
  prompts = sets[second]
  if not _is_derived(getattr(config, second)):
    return prompts
  same = find_same(prompts, sets[first])
  if not same:
    return prompts
  index, other = next(iter(same.items()))
  example = f'such as {prompts[index]}, which is {sets[first][other]}'
  if len(same) == len(prompts):
    raise UserError(
      f'prompts.{second}: prompts.{first} has all {len(same):,} prompts too, {example}. Give other '
      'prompts.'
    )
  say(
    f'prompts.{second}: {len(same):,} of {len(prompts):,} prompts are left out because '
    f'prompts.{first} has them too, {example}'
  )
  return [prompt for i, prompt in enumerate(prompts) if i not in same]


def _leave_out_near_duplicates(
  name: str, sets: Mapping[str, list[Prompt]], config: PromptSets
) -> list[Prompt]:
  """Return the training prompts of a set that have no near-duplicate among held-out prompts.

  Prompts of the embedded world stay. Its grammar makes them similar, and its splits differ in what
  they ask for.
  """
  if getattr(config, name).source == 'tiny':
    return sets[name]
  held_out = [prompt for other in HELD_OUT for prompt in sets[other]]
  near = find_near_duplicates([p.messages for p in sets[name]], [p.messages for p in held_out])
  near |= find_same(sets[name], held_out)
  if not near:
    return sets[name]
  first, other = next(iter(near.items()))
  if len(near) == len(sets[name]):
    raise UserError(
      f'prompts.{name}: all {len(near)} prompts are near-duplicates of held-out ones, such as '
      f'{sets[name][first]} of {held_out[other]}. Give other held-out prompts.'
    )
  say(
    f'prompts.{name}: {len(near):,} of {len(sets[name]):,} prompts are left out because they are '
    f'near-duplicates of held-out ones, such as {sets[name][first]} of {held_out[other]}'
  )
  return [prompt for i, prompt in enumerate(sets[name]) if i not in near]


def check_held_out(training: Iterable[Prompt], sets: Mapping[str, list[Prompt]]) -> None:
  """Check that no held-out prompt of a run occurs among the training prompts, by content.

  Args:
    training: prompts to train on.
    sets: the prompt sets of the run.

  Raises:
    UserError: if a held-out prompt occurs among them.
  """
  check_disjoint(training, [prompt for name in HELD_OUT for prompt in sets[name]])


def _load_prompts(name: str, source: PromptSource, seed: int) -> list[Prompt]:
  try:
    return load_prompts(source, seed)
  except UserError as error:
    raise UserError(f'prompts.{name}: {error}') from error


def _check_unique_ids(
  sets: Mapping[str, list[Prompt]], names: tuple[str, str], config: PromptSets
) -> None:
  seen: dict[str, Prompt] = {}
  for name in names:
    for prompt in sets[name]:
      if prompt.id in seen:
        first = seen[prompt.id]
        editable = [f'prompts.{n}' for n in names if not _is_derived(getattr(config, n))]
        raise UserError(
          f'prompts.{names[0]} and prompts.{names[1]} both contain the id {prompt.id!r}: {first} '
          f'and {prompt}. {_how_to_separate(first, prompt, editable)}'
        )
      seen[prompt.id] = prompt


def _how_to_separate(first: Prompt, second: Prompt, editable: Sequence[str]) -> str:
  """Return what to do about two prompts of one id, in sets of which some can be edited."""
  if first.messages != second.messages:
    return 'Give each prompt its own id, or rename one of the two files of a mixture.'
  place = f'it from {editable[0]}' if len(editable) == 1 else 'one of the two'
  return f'They are the same dialogue. Remove {place}, or give each an id.'
