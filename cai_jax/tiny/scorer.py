"""The embedded world's oracle as the scorer 'tiny'."""

from collections.abc import Sequence

from cai_jax.dialogue import Message
from cai_jax.scoring.loader import ModelLoader
from cai_jax.scoring.scorer import SCORERS, Scorer
from cai_jax.tiny import oracle


@SCORERS.register('tiny')
def load_oracle(loader: ModelLoader) -> Scorer:
  """Return a scorer that applies the oracle's exact rules. It needs no model."""
  del loader
  return score_with_oracle


def score_with_oracle(
  prompts: Sequence[Sequence[Message]], responses: Sequence[str]
) -> list[oracle.Verdict]:
  """Return the oracle's verdict on each response.

  Args:
    prompts: the messages that each response answers. Each must be a request of the embedded world.
    responses: one text per prompt.

  Raises:
    UserError: if a prompt is not a request of the embedded world.
  """
  return [
    oracle.judge(prompt, response) for prompt, response in zip(prompts, responses, strict=True)
  ]
