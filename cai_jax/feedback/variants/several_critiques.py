"""Sample several critiques under one principle, merge them, and revise once."""

import dataclasses
import functools
from collections.abc import Sequence

from cai_jax.constitution import Principle
from cai_jax.data.prompts import Prompt
from cai_jax.feedback.candidates import MAX_CANDIDATES, describe_reply, numbered
from cai_jax.feedback.chain import (
  Context,
  Round,
  Stages,
  TurnPlan,
  message,
  register_variant,
  revise_in_rounds,
  sample_revision,
)
from cai_jax.feedback.lists import number_texts
from cai_jax.feedback.score import VariantChain
from cai_jax.feedback.stage import Reply
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.settings import setting
from cai_jax.runtime.values import convert_fields


@dataclasses.dataclass(frozen=True)
class Options:
  """How many critiques there are, and how they are merged.

  Raises:
    UserError: if a value is not allowed.
  """

  n: int = setting(3, 'Number of critiques in each round.')
  merge: str = setting(
    'model',
    "'model': the critic reads all critiques and writes one. 'join': the different ones are joined "
    'in their order, without another turn.',
  )
  request: str = setting(
    'Merge these critiques into one. Keep every point, and say nothing twice:',
    "What the critic is asked, before the list of critiques, for merge='model'.",
  )

  def __post_init__(self):
    convert_fields(self, 'feedback.options')
    if not 1 <= self.n <= MAX_CANDIDATES:
      raise UserError(f'feedback.options: n={self.n} must be between 1 and {MAX_CANDIDATES}.')
    if self.merge not in ('model', 'join'):
      raise UserError(f"feedback.options: merge={self.merge!r} must be 'model' or 'join'.")


def _turns(rounds: int, options: Options) -> TurnPlan:
  plan = [('initial', 'initial')]
  for number in range(1, rounds + 1):
    plan += [(name, 'critique') for name in numbered(f'critique_{number}', options.n)]
    plan += [(f'merge_{number}', 'critique')] if options.merge == 'model' else []
    plan.append((f'revision_{number}', 'revision'))
  return plan


def _chain(
  prompt: Prompt,
  principles: Sequence[Principle],
  stages: Stages,
  growing: bool = False,
  *,
  options: Options,
  keep_equal: bool = False,
) -> VariantChain:
  """Return the chain; with `keep_equal`, equal critiques are all joined, as in the longest chain.

  Placeholder replies have equal texts, but stand for replies that differ.
  """

  def revise(number: int, principle: Principle, context: Context, stages: Stages) -> VariantChain:
    response = list(context)
    context.append(message('critique_request', principle.critique_request))
    critiques = []
    for name in numbered(f'critique_{number}', options.n):
      critiques.append((yield from stages.critique.ask(name, context, 'critique')))
    kept: Reply = critiques[0]
    texts = [critique.text for critique in critiques]
    merged: str | Reply = ' '.join(texts if keep_equal else dict.fromkeys(texts))
    if options.merge == 'model':
      request = number_texts(options.request, texts)
      asked = [*response, message('critique_request', request)]
      merged = kept = yield from stages.critique.ask(f'merge_{number}', asked, 'critique')
    context.append(message('critique', merged))
    revision = yield from sample_revision(number, principle, context, stages)
    details = {'critiques': [describe_reply(critique) for critique in critiques]}
    return Round(principle, kept, revision, details)

  return revise_in_rounds(prompt, principles, stages, growing, revise)


@register_variant(
  'several_critiques',
  _turns,
  longest=functools.partial(_chain, keep_equal=True),
  options=Options,
  records=True,
  repeats=lambda options: {'critique': options.n},
)
def several_critiques(
  prompt: Prompt,
  principles: Sequence[Principle],
  stages: Stages,
  growing: bool = False,
  *,
  options: Options,
) -> VariantChain:
  """Sample n critiques of the latest response in each round; the reviser reads them merged.

  The critique of the record is the merged one; if critiques are joined, which samples nothing, it
  is the first.

  Args:
    prompt: the prompt x.
    principles: one principle for each round.
    stages: models, rendering and sampling settings.
    growing: whether a round sees all earlier rounds.
    options: how many critiques, and how they are merged.
  """
  return _chain(prompt, principles, stages, growing, options=options)
