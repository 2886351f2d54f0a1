"""Critique and revise under all principles of the constitution at once."""

import dataclasses
from collections.abc import Sequence

from cai_jax.constitution import Constitution, Principle
from cai_jax.data.prompts import Prompt
from cai_jax.feedback.chain import (
  Context,
  Round,
  Stages,
  TurnPlan,
  register_variant,
  revise_in_rounds,
  sample_critique,
  sample_revision,
  turns_per_round,
)
from cai_jax.feedback.lists import number_texts
from cai_jax.feedback.score import VariantChain
from cai_jax.runtime.settings import setting
from cai_jax.runtime.values import convert_fields


@dataclasses.dataclass(frozen=True)
class Options:
  """The texts before the lists of requests."""

  critique_opening: str = setting(
    'Consider each of these requests, and answer all of them in one critique:',
    'What stands before the critique requests.',
  )
  revision_opening: str = setting(
    'Write one revision that does all of this:', 'What stands before the revision requests.'
  )

  def __post_init__(self):
    convert_fields(self, 'feedback.options')


def _turns(rounds: int, options: Options) -> TurnPlan:
  del options
  return turns_per_round('critique', 'revision')(rounds)


@register_variant(
  'all_principles',
  _turns,
  needs=('constitution',),
  options=Options,
  records=True,
  applies_drawn=False,
)
def all_principles(
  prompt: Prompt,
  principles: Sequence[Principle],
  stages: Stages,
  growing: bool = False,
  *,
  constitution: Constitution,
  options: Options,
) -> VariantChain:
  """Sample one critique and one revision in each round, both under every principle.

  Args:
    prompt: the prompt x.
    principles: the principles that are drawn for the rounds; only their number is used.
    stages: models, rendering and sampling settings.
    growing: whether a round sees all earlier rounds.
    constitution: the principles.
    options: the texts before the lists of requests.
  """
  whole = Principle(
    'all',
    number_texts(options.critique_opening, [p.critique_request for p in constitution.principles]),
    number_texts(options.revision_opening, [p.revision_request for p in constitution.principles]),
  )
  ids = [principle.id for principle in constitution.principles]

  def revise(number: int, principle: Principle, context: Context, stages: Stages) -> VariantChain:
    del principle
    critique = yield from sample_critique(number, whole, context, stages)
    revision = yield from sample_revision(number, whole, context, stages)
    return Round(None, critique, revision, {'principles': ids})

  return revise_in_rounds(prompt, principles, stages, growing, revise)
