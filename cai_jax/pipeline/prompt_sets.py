"""Load the four prompt sets of a run."""

import dataclasses
from collections.abc import Iterable, Mapping

from cai_jax.data.prompts import Prompt, PromptSource, check_disjoint, load_prompts
from cai_jax.pipeline.schema import PromptSets
from cai_jax.runtime.errors import UserError

NAMES = tuple(field.name for field in dataclasses.fields(PromptSets))
HELD_OUT = ('eval_harmful', 'eval_helpful')


def load_prompt_sets(config: PromptSets, seed: int) -> dict[str, list[Prompt]]:
  """Return the prompts of each set; a set without a source is empty.

  Args:
    config: the sources.
    seed: seed of the run, for shuffling and for the prompts of the embedded world.

  Raises:
    UserError: if a source cannot be read, two prompts have the same id, or a held-out prompt occurs
      among the training prompts.
  """
  sets = {name: _load_prompts(name, getattr(config, name), seed) for name in NAMES}
  for pair in (('harmful', 'helpful'), HELD_OUT):
    _check_unique_ids(sets, pair)
  check_held_out(sets['harmful'] + sets['helpful'], sets)
  return sets


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


def _check_unique_ids(sets: Mapping[str, list[Prompt]], names: tuple[str, str]) -> None:
  seen: dict[str, Prompt] = {}
  for name in names:
    for prompt in sets[name]:
      if prompt.id in seen:
        first = seen[prompt.id]
        raise UserError(
          f'prompts.{names[0]} and prompts.{names[1]} both contain the id {prompt.id!r}: {first} '
          f'and {prompt}. {_how_to_separate(first, prompt)}'
        )
      seen[prompt.id] = prompt


def _how_to_separate(first: Prompt, second: Prompt) -> str:
  if first.messages == second.messages:
    return 'They are the same dialogue. Remove one of the two, or give each an id.'
  return 'Give each prompt its own id.'
