"""Sample several critiques with a revision each, and keep the best pair."""

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
)
from cai_jax.feedback.score import VariantChain


def _names(number: int, options: CandidateOptions) -> list[tuple[str, str]]:
  """Return the names of the critique and the revision of each candidate."""
  names = (numbered(f'{stage}_{number}', options.n) for stage in ('critique', 'revision'))
  return list(zip(*names, strict=True))


def _turns(rounds: int, options: CandidateOptions) -> TurnPlan:
  plan = [('initial', 'initial')]
  for number in range(1, rounds + 1):
    for critique, revision in _names(number, options):
      plan += [(critique, 'critique'), (revision, 'revision')]
  return plan


@register_variant(
  'best_critique',
  _turns,
  options=CandidateOptions,
  rater=rater_of,
  records=True,
  repeats=lambda options: {'critique': options.n},
  reads_logprobs=rated_by_likelihood,
)
def best_critique(
  prompt: Prompt,
  principles: Sequence[Principle],
  stages: Stages,
  growing: bool = False,
  *,
  options: CandidateOptions,
) -> VariantChain:
  """Sample n critiques in each round with one revision each, and keep the best pair.

  A critique is worth what its revision is worth, so anything that rates responses can choose.

  Args:
    prompt: the prompt x.
    principles: one principle for each round.
    stages: models, rendering and sampling settings.
    growing: whether a round sees all earlier rounds.
    options: how many critiques, and what rates their revisions.
  """

  def revise(number: int, principle: Principle, context: Context, stages: Stages) -> VariantChain:
    context.append(message('critique_request', principle.critique_request))
    request = message('revision_request', principle.revision_request)
    critiques, revisions = [], []
    for critique_name, revision_name in _names(number, options):
      critique = yield from stages.critique.ask(critique_name, context, 'critique')
      branch = [*context, message('critique', critique), request]
      revisions.append((yield from stages.revision.ask(revision_name, branch, 'revision')))
      critiques.append(critique)
    best, ratings = yield from choose_best(f'ratings_{number}', prompt, revisions, options)
    context += [message('critique', critiques[best]), request]
    details = describe_candidates(best, ratings, critique=critiques, revision=revisions)
    return Round(principle, critiques[best], revisions[best], details)

  return revise_in_rounds(prompt, principles, stages, growing, revise)
