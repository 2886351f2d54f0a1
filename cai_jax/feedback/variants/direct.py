"""Revise without a critique (Bai et al. 2022, section 3.5)."""

from collections.abc import Generator

from cai_jax.constitution import Principle
from cai_jax.feedback.chain import (
  Context,
  Round,
  Stages,
  register_rounds,
  sample_revision,
)
from cai_jax.sampling.types import Completion, Turn


@register_rounds('direct', 'revision')
def direct_revision(
  number: int, principle: Principle, context: Context, stages: Stages
) -> Generator[Turn, Completion, Round]:
  """Sample a revision of the latest response."""
  revision = yield from sample_revision(number, principle, context, stages)
  return Round(principle, None, revision)
