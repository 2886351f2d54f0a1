"""Revise without a critique (Bai et al. 2022, section 3.5)."""

from collections.abc import Generator, Sequence

from cai_jax.constitution import Principle
from cai_jax.data.prompts import Prompt
from cai_jax.feedback.chain import (
  Context,
  Round,
  Stages,
  register_variant,
  revise_in_rounds,
  sample_revision,
  turns_per_round,
)
from cai_jax.sampling.types import Chain, Completion, Turn


@register_variant('direct', turns_per_round('revision'))
def direct_revision(
  prompt: Prompt, principles: Sequence[Principle], stages: Stages, growing: bool = False
) -> Chain:
  """Sample y_init, then a revision of the latest response in each round.

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
  revision = yield from sample_revision(number, principle, context, stages)
  return Round(principle, None, revision)
