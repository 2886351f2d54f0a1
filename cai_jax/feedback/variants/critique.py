"""Critique the latest response, then revise it (Bai et al. 2022, section 3.1)."""

from collections.abc import Generator

from cai_jax.constitution import Principle
from cai_jax.feedback.chain import (
  Context,
  Round,
  Stages,
  register_rounds,
  sample_critique,
  sample_revision,
)
from cai_jax.sampling.types import Completion, Turn


@register_rounds('critique', 'critique', 'revision')
def critique_revision(
  number: int, principle: Principle, context: Context, stages: Stages
) -> Generator[Turn, Completion, Round]:
  """Sample a critique of the latest response, then its revision."""
  critique = yield from sample_critique(number, principle, context, stages)
  revision = yield from sample_revision(number, principle, context, stages)
  return Round(principle, critique, revision)
