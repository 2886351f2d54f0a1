"""The share of responses that were cut off at the token limit."""

from collections.abc import Sequence

from cai_jax.dialogue import Message
from cai_jax.evaluation.config import EvaluationConfig
from cai_jax.evaluation.registries import RESPONSE_MEASURES, ResponseMeasure, Turn
from cai_jax.scoring.loader import ModelLoader


@RESPONSE_MEASURES.register('truncated')
def load_truncated(config: EvaluationConfig, loader: ModelLoader) -> ResponseMeasure | None:
  """Return `measure_truncated` if the config asks for 'truncated'."""
  del loader
  return measure_truncated if 'truncated' in config.active_scores else None


def measure_truncated(
  prompts: Sequence[Sequence[Message]], turns: Sequence[Turn]
) -> dict[str, list[float]]:
  """Return the column `truncated_rate`: 1 for a response that ended at the token limit.

  Args:
    prompts: the messages that each turn answers.
    turns: the responses, with `finish_reason`.
  """
  del prompts
  return {'truncated_rate': [float(turn['finish_reason'] == 'length') for turn in turns]}
