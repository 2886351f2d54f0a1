"""A control with empty critiques, which shows the effect of the requests alone."""

from collections.abc import Generator

from cai_jax.constitution import Principle
from cai_jax.feedback.chain import (
  Context,
  Round,
  Stages,
  insert_critique,
  register_rounds,
  sample_revision,
)
from cai_jax.sampling.types import Completion, Turn


@register_rounds('empty', 'revision')
def empty_critique(
  number: int, principle: Principle, context: Context, stages: Stages
) -> Generator[Turn, Completion, Round]:
  """Sample a revision after an empty critique, which the record leaves out."""
  insert_critique('', principle, context)
  revision = yield from sample_revision(number, principle, context, stages)
  return Round(principle, None, revision)
