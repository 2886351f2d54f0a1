"""Rewards of responses, as a reward model scores them."""

from collections.abc import Sequence

from cai_jax.dialogue import Message
from cai_jax.evaluation.config import EvaluationConfig
from cai_jax.evaluation.registries import RESPONSE_MEASURES, ResponseMeasure, Turn
from cai_jax.scoring.loader import ModelLoader
from cai_jax.scoring.reward import append_replies


@RESPONSE_MEASURES.register('reward')
def load_reward(config: EvaluationConfig, loader: ModelLoader) -> ResponseMeasure | None:
  """Return a measure with the column `reward`, or None if the config names no reward model.

  Raises:
    UserError: if the model cannot be loaded or has no such label.
  """
  if not config.reward_model:
    return None
  model = loader.reward_model(config.reward_model, config.style)
  label = model.label_index(config.reward_label or None)

  def measure(
    prompts: Sequence[Sequence[Message]], turns: Sequence[Turn]
  ) -> dict[str, list[float]]:
    conversations = append_replies(prompts, [turn['text'] for turn in turns])
    return {'reward': model.scores(conversations, label)}

  return measure
