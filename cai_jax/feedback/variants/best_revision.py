"""Sample several revisions after one critique, and keep the best one."""

from collections.abc import Sequence

from cai_jax.constitution import Principle
from cai_jax.data.prompts import Prompt
from cai_jax.feedback.candidates import (
  CandidateOptions,
  choose_best,
  describe_candidates,
  numbered,
  rated_by_likelihood,
  rater_of,
)
from cai_jax.feedback.chain import (
  Context,
  Round,
  Stages,
  TurnPlan,
  message,
  register_variant,
  revise_in_rounds,
  sample_critique,
)
from cai_jax.feedback.score import VariantChain


def _turns(rounds: int, options: CandidateOptions) -> TurnPlan:
  plan = [('initial', 'initial')]
  for number in range(1, rounds + 1):
    plan.append((f'critique_{number}', 'critique'))
    plan += [(name, 'revision') for name in numbered(f'revision_{number}', options.n)]
  return plan


@register_variant(
  'best_revision',
  _turns,
  options=CandidateOptions,
  rater=rater_of,
  records=True,
  repeats=lambda options: {'revision': options.n},
  reads_logprobs=rated_by_likelihood,
)
def best_revision(
  prompt: Prompt,
  principles: Sequence[Principle],
  stages: Stages,
  growing: bool = False,
  *,
  options: CandidateOptions,
) -> VariantChain:
  """Sample a critique and n revisions in each round, and keep the revision with the best rating.

  Args:
    prompt: the prompt x.
    principles: one principle for each round.
    stages: models, rendering and sampling settings.
    growing: whether a round sees all earlier rounds.
    options: how many revisions, and what rates them.
  """

  def revise(number: int, principle: Principle, context: Context, stages: Stages) -> VariantChain:
    critique = yield from sample_critique(number, principle, context, stages)
    context.append(message('revision_request', principle.revision_request))
    revisions = []
    for name in numbered(f'revision_{number}', options.n):
      revisions.append((yield from stages.revision.ask(name, context, 'revision')))
    best, ratings = yield from choose_best(f'ratings_{number}', prompt, revisions, options)
    details = describe_candidates(best, ratings, revision=revisions)
    return Round(principle, critique, revisions[best], details)

  return revise_in_rounds(prompt, principles, stages, growing, revise)
