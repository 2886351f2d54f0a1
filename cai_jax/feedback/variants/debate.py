"""Let two critics debate the latest response; the reviser reads the transcript."""

import dataclasses
from collections.abc import Sequence

from cai_jax.constitution import Principle
from cai_jax.data.prompts import Prompt
from cai_jax.feedback.candidates import describe_reply
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
from cai_jax.feedback.score import VariantChain
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.settings import setting
from cai_jax.runtime.values import convert_fields

MAX_STATEMENTS = 20
CRITICS = ('initial', 'critique', 'revision')  # stages whose model may be the second critic


@dataclasses.dataclass(frozen=True)
class Options:
  """Who debates, and for how long.

  Raises:
    UserError: if a value is not allowed.
  """

  statements: int = setting(
    3, 'Number of statements in each round: of the first critic, the second, the first again, ...'
  )
  second_critic: str = setting(
    'critique', "The stage whose model and sampling the second critic has, such as 'revision'."
  )
  reply_request: str = setting(
    'Another critic reads this. Say which points are right, which are wrong, and what is missing.',
    'What each critic is asked after the first statement.',
  )

  def __post_init__(self):
    convert_fields(self, 'feedback.options')
    if not 2 <= self.statements <= MAX_STATEMENTS:
      raise UserError(
        f'feedback.options: statements={self.statements} must be between 2 and {MAX_STATEMENTS}.'
      )
    if self.second_critic not in CRITICS:
      raise UserError(
        f'feedback.options: second_critic={self.second_critic!r} must be one of {CRITICS}.'
      )


def _replies(number: int, options: Options) -> list[tuple[str, str]]:
  """Return (turn name, stage name) of each statement after the first."""
  return [
    (f'reply_{number}_{i}', 'critique' if i % 2 else options.second_critic)
    for i in range(2, options.statements + 1)
  ]


def _turns(rounds: int, options: Options) -> TurnPlan:
  plan = [('initial', 'initial')]
  for number in range(1, rounds + 1):
    plan += [(f'critique_{number}', 'critique'), *_replies(number, options)]
    plan.append((f'revision_{number}', 'revision'))
  return plan


@register_variant('debate', _turns, options=Options, records=True)
def debate(
  prompt: Prompt,
  principles: Sequence[Principle],
  stages: Stages,
  growing: bool = False,
  *,
  options: Options,
) -> VariantChain:
  """Sample statements of two critics in turn, then a revision that reads all of them.

  Args:
    prompt: the prompt x.
    principles: one principle for each round.
    stages: models, rendering and sampling settings.
    growing: whether a round sees all earlier rounds.
    options: who debates, and for how long.
  """

  def revise(number: int, principle: Principle, context: Context, stages: Stages) -> VariantChain:
    critique = yield from sample_critique(number, principle, context, stages)
    replies = []
    for name, stage in _replies(number, options):
      context.append(message('critique_request', options.reply_request))
      reply = yield from stages.by_name()[stage].ask(name, context, 'critique')
      context.append(message('critique', reply))
      replies.append(reply)
    revision = yield from sample_revision(number, principle, context, stages)
    details = {'replies': [describe_reply(reply) for reply in replies]}
    return Round(principle, critique, revision, details)

  return revise_in_rounds(prompt, principles, stages, growing, revise)
