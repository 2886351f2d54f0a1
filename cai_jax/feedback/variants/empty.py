"""A control with empty critiques, which shows the effect of the requests alone."""

from collections.abc import Generator, Sequence

from cai_jax.constitution import Principle
from cai_jax.data.prompts import Prompt
from cai_jax.feedback.chain import (
  Context,
  Round,
  Stages,
  insert_critique,
  register_variant,
  revise_in_rounds,
  sample_revision,
  turns_per_round,
)
from cai_jax.sampling.types import Chain, Completion, Turn


@register_variant('empty', turns_per_round('revision'))
def empty_critique(
  prompt: Prompt, principles: Sequence[Principle], stages: Stages, growing: bool = False
) -> Chain:
  """Sample y_init, then in each round a revision that follows an empty critique.

  The rounds of the record have no critique, since none is sampled.

  Args:
    prompt: the prompt x.
    principles: one principle for each round.
    stages: models, rendering and sampling settings.
    growing: whether a round sees all earlier rounds.
  """
  return (yield from revise_in_rounds(prompt, principles, stages, growing, _revise))


def _revise(
  number: int, principle: Principle, context: Context, stages: Stages
) -> Generator[Turn, Completion, Round]:
  insert_critique('', principle, context)
  revision = yield from sample_revision(number, principle, context, stages)
  return Round(principle, None, revision)
