"""Revise only if the critique finds something; otherwise the response stays."""

import dataclasses
import functools
from collections.abc import Callable, Generator, Sequence
from typing import Any

from cai_jax.constitution import Principle
from cai_jax.data.prompts import Prompt
from cai_jax.data.quality import finds_nothing
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
from cai_jax.feedback.labels import LABEL_STAGE, label_log_probabilities, label_turns
from cai_jax.feedback.score import VariantChain
from cai_jax.feedback.stage import Reply
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.settings import setting
from cai_jax.runtime.values import convert_fields
from cai_jax.sampling.types import Completion, Turn

Decision = Generator[Turn, Completion, tuple[bool, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Options:
  """How the variant decides.

  Raises:
    UserError: if a value is not allowed.
  """

  decide: str = setting(
    'text',
    "'text': a critique with a phrase such as 'nothing wrong', and no objection, finds nothing. "
    "'labels': the critic is asked, and the log-probabilities of two labels decide.",
  )
  question: str = setting(
    'Does this critique name something that is wrong with the response? Answer Yes or No.',
    "What the critic is asked, for decide='labels'.",
  )
  finding: str = setting('Yes', 'The label for a finding.')
  no_finding: str = setting(
    'No', 'The label for none. The first tokens in which the two labels differ compete.'
  )
  min_log_odds: float = setting(
    0.0, 'Smallest log P(finding) - log P(no_finding), in nats, at which a round revises.'
  )

  def __post_init__(self):
    convert_fields(self, 'feedback.options')
    if self.decide not in _DECISIONS:
      raise UserError(
        f'feedback.options: decide={self.decide!r} must be one of {tuple(_DECISIONS)}.'
      )
    if not self.question.strip() or not all(self.labels) or self.finding == self.no_finding:
      raise UserError(
        f'feedback.options: question={self.question!r}, finding={self.finding!r} and '
        f'no_finding={self.no_finding!r} must be a question and two different labels.'
      )

  @property
  def labels(self) -> tuple[str, str]:
    """The two labels."""
    return self.finding, self.no_finding


def _by_text(
  number: int, critique: Reply, context: Context, stages: Stages, options: Options
) -> Decision:
  """Return whether the text of the critique has an objection."""
  del number, context, stages, options
  yield from ()
  turn = {'text': critique.text, 'finish_reason': critique.completion.finish_reason}
  return not finds_nothing(turn), {}


def _by_labels(
  number: int, critique: Reply, context: Context, stages: Stages, options: Options
) -> Decision:
  """Return whether the critic's log-odds of the labels reach the limit, and the log-odds."""
  del critique
  asked = [*context, message('critique_request', options.question)]
  first, second = yield from label_log_probabilities(
    stages.extra['decision'], f'decision_{number}', asked, 'critique', options.labels
  )
  return first - second >= options.min_log_odds, {'log_odds': first - second}


_DECISIONS: dict[str, Callable[..., Decision]] = {'text': _by_text, 'labels': _by_labels}


def _turns(rounds: int, options: Options) -> TurnPlan:
  plan = [('initial', 'initial')]
  for number in range(1, rounds + 1):
    plan.append((f'critique_{number}', 'critique'))
    if options.decide == 'labels':
      names = label_turns(f'decision_{number}', len(options.labels))
      plan += [(name, 'decision') for name in names]
    plan.append((f'revision_{number}', 'revision'))
  return plan


def _chain(
  prompt: Prompt,
  principles: Sequence[Principle],
  stages: Stages,
  growing: bool = False,
  *,
  options: Options,
  always: bool = False,
) -> VariantChain:
  """Return the chain; with `always`, every round revises, as in the longest chain."""

  def revise(number: int, principle: Principle, context: Context, stages: Stages) -> VariantChain:
    critique = yield from sample_critique(number, principle, context, stages)
    decide = _DECISIONS[options.decide]
    found, details = yield from decide(number, critique, context, stages, options)
    details = {'found': found} | details
    if not (found or always):
      return Round(principle, critique, None, details)
    revision = yield from sample_revision(number, principle, context, stages)
    return Round(principle, critique, revision, details)

  return revise_in_rounds(prompt, principles, stages, growing, revise)


@register_variant(
  'if_needed',
  _turns,
  longest=functools.partial(_chain, always=True),
  options=Options,
  stages={'decision': LABEL_STAGE},
  records=True,
)
def revise_if_needed(
  prompt: Prompt,
  principles: Sequence[Principle],
  stages: Stages,
  growing: bool = False,
  *,
  options: Options,
) -> VariantChain:
  """Sample a critique in each round, and a revision only if the critique finds something.

  Args:
    prompt: the prompt x.
    principles: one principle for each round.
    stages: models, rendering and sampling settings.
    growing: whether a round sees all earlier rounds.
    options: how the variant decides.
  """
  return _chain(prompt, principles, stages, growing, options=options)
