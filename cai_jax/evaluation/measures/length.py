"""Lengths of responses."""

from collections.abc import Sequence

from cai_jax.dialogue import Message
from cai_jax.evaluation.config import EvaluationConfig
from cai_jax.evaluation.registries import RESPONSE_MEASURES, ResponseMeasure, Turn
from cai_jax.scoring.loader import ModelLoader


@RESPONSE_MEASURES.register('length')
def load_length(config: EvaluationConfig, loader: ModelLoader) -> ResponseMeasure:
  """Return `measure_length`. Every run uses this measure."""
  del config, loader
  return measure_length


def measure_length(
  prompts: Sequence[Sequence[Message]], turns: Sequence[Turn]
) -> dict[str, list[float]]:
  """Return the column `mean_tokens`, the number of tokens of each response.

  Args:
    prompts: the messages that each turn answers.
    turns: the responses, with `num_tokens`.
  """
  del prompts
  return {'mean_tokens': [float(turn['num_tokens']) for turn in turns]}
