"""Let the model choose the principle of each round for the prompt and the latest response."""

import dataclasses
import functools
from collections.abc import Sequence

from cai_jax.constitution import Constitution, Principle
from cai_jax.data.prompts import Prompt
from cai_jax.feedback.candidates import finite_or_none
from cai_jax.feedback.chain import (
  Context,
  Round,
  Stages,
  TurnPlan,
  message,
  register_variant,
  revise_in_rounds,
  sample_critique,
  sample_revision,
)
from cai_jax.feedback.labels import LABEL_STAGE, choose_label
from cai_jax.feedback.lists import LETTERS, letter_texts
from cai_jax.feedback.score import VariantChain
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.settings import setting
from cai_jax.runtime.values import convert_fields


@dataclasses.dataclass(frozen=True)
class Options:
  """What the model is asked."""

  question: str = setting(
    'Which of these requests matters most for the response above? Answer with its letter only.',
    'What the critic is asked, before the list of critique requests with the letters A, B, C, ...',
  )

  def __post_init__(self):
    convert_fields(self, 'feedback.options')


def _turns(rounds: int, options: Options) -> TurnPlan:
  del options
  plan = [('initial', 'initial')]
  for number in range(1, rounds + 1):
    plan += [(f'{stage}_{number}', stage) for stage in ('choice', 'critique', 'revision')]
  return plan


def _check(constitution: Constitution, options: Options) -> None:
  """Raise UserError if there are more principles than letters."""
  del options
  if (count := len(constitution.principles)) > len(LETTERS):
    raise UserError(
      f"feedback.variant='chosen_principle' offers at most {len(LETTERS)} principles, but the "
      f'constitution has {count}. Select some of them with constitution.ids or constitution.tags.'
    )


def _chain(
  prompt: Prompt,
  principles: Sequence[Principle],
  stages: Stages,
  growing: bool = False,
  *,
  constitution: Constitution,
  options: Options,
  use_drawn: bool = False,
) -> VariantChain:
  """Return the chain; with `use_drawn`, the choice has no effect, as in the longest chain."""

  def revise(number: int, drawn: Principle, context: Context, stages: Stages) -> VariantChain:
    start, index, logprob = constitution.principles.index(drawn), 0, 0.0
    offered = constitution.principles[start:] + constitution.principles[:start]
    if len(offered) > 1:
      request = letter_texts(options.question, [p.critique_request for p in offered])
      asked = [*context, message('critique_request', request)]
      labels = LETTERS[: len(offered)]
      index, logprob = yield from choose_label(
        stages.extra['choice'], f'choice_{number}', asked, 'critique', labels
      )
    principle = drawn if use_drawn else offered[index]
    critique = yield from sample_critique(number, principle, context, stages)
    revision = yield from sample_revision(number, principle, context, stages)
    details = {'choice': LETTERS[index], 'choice_logprob': finite_or_none(logprob)}
    return Round(principle, critique, revision, details)

  return revise_in_rounds(prompt, principles, stages, growing, revise)


@register_variant(
  'chosen_principle',
  _turns,
  needs=('constitution',),
  longest=functools.partial(_chain, use_drawn=True),
  options=Options,
  stages={'choice': LABEL_STAGE},
  records=True,
  check=_check,
  applies_drawn=False,
)
def chosen_principle(
  prompt: Prompt,
  principles: Sequence[Principle],
  stages: Stages,
  growing: bool = False,
  *,
  constitution: Constitution,
  options: Options,
) -> VariantChain:
  """Ask the critic for the principle of each round, then critique and revise under it.

  The choice is drawn with the critic's probabilities of the letters, at the temperature of
  critiques. A principle may be chosen again. The list begins with the principle that is drawn for
  the round and goes on in the order of the constitution, so a critic that always answers A chooses
  no principle more often than another. `choice` in the details is the letter.

  Args:
    prompt: the prompt x.
    principles: the principles that are drawn for the rounds, with which the lists begin.
    stages: models, rendering and sampling settings.
    growing: whether a round sees all earlier rounds.
    constitution: the principles on offer.
    options: what the critic is asked.
  """
  return _chain(prompt, principles, stages, growing, constitution=constitution, options=options)
