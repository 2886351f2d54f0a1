"""Critique and revise by a constitution in prose, which the models read whole."""

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
from cai_jax.feedback.score import VariantChain
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.settings import setting
from cai_jax.runtime.values import convert_fields


@dataclasses.dataclass(frozen=True)
class Options:
  """The texts around the document."""

  opening: str = setting('Here is our constitution:', 'What stands before the document.')
  critique_request: str = setting(
    'Name each section from which your last response departs, and say how.',
    'What the critic is asked after the document.',
  )
  revision_request: str = setting(
    'Rewrite your last response so that it follows the whole constitution and still helps.',
    'What the reviser is asked after the critique.',
  )

  def __post_init__(self):
    convert_fields(self, 'feedback.options')


def _turns(rounds: int, options: Options) -> TurnPlan:
  del options
  return turns_per_round('critique', 'revision')(rounds)


def _check(constitution: Constitution, options: Options) -> None:
  """Raise UserError if the constitution is no document."""
  del options
  if not constitution.document:
    raise UserError(
      "feedback.variant='prose' reads a document, but this constitution is a list of principles. "
      "Give a Markdown file in sections as constitution.path, or use the variant 'all_principles'."
    )


@register_variant(
  'prose',
  _turns,
  needs=('constitution',),
  options=Options,
  records=True,
  check=_check,
  applies_drawn=False,
)
def prose(
  prompt: Prompt,
  principles: Sequence[Principle],
  stages: Stages,
  growing: bool = False,
  *,
  constitution: Constitution,
  options: Options,
) -> VariantChain:
  """Sample a critique and a revision in each round by the whole document.

  With other variants, the principle of a round is one section of the document.

  Args:
    prompt: the prompt x.
    principles: the sections that are drawn for the rounds; only their number is used.
    stages: models, rendering and sampling settings.
    growing: whether a round sees all earlier rounds.
    constitution: the document.
    options: the texts around the document.
  """
  request = f'{options.opening}\n\n{constitution.document}\n\n{options.critique_request}'
  whole = Principle('document', request, options.revision_request)
  sections = [principle.id for principle in constitution.principles]

  def revise(number: int, principle: Principle, context: Context, stages: Stages) -> VariantChain:
    del principle
    critique = yield from sample_critique(number, whole, context, stages)
    revision = yield from sample_revision(number, whole, context, stages)
    return Round(None, critique, revision, {'sections': sections})

  return revise_in_rounds(prompt, principles, stages, growing, revise)
