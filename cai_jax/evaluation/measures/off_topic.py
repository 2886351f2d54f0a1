"""The share of responses that M_θ finds no more likely for their prompt than for other prompts."""

from collections.abc import Sequence

from cai_jax.dialogue import Dialogue, Message
from cai_jax.evaluation.config import EvaluationConfig
from cai_jax.evaluation.registries import RESPONSE_MEASURES, ResponseMeasure, Turn
from cai_jax.scoring.loader import ModelLoader
from cai_jax.scoring.topicality import find_off_topic


@RESPONSE_MEASURES.register('off_topic')
def load_off_topic(config: EvaluationConfig, loader: ModelLoader) -> ResponseMeasure | None:
  """Return a measure with the columns `off_topic_rate` and `topic_score`.

  Returns:
    The measure, or None if the config does not ask for it, or M_θ is a served model, which gives no
    log-probabilities of given texts.

  Raises:
    UserError: if M_θ cannot be loaded.
  """
  if 'off_topic' not in config.active_scores or 'base' not in loader.aliases:
    return None
  lm = loader.language_model('base')
  dialogue = Dialogue(lm.tokenizer, loader.style, lm.eos_token_ids, loader.template_options)

  def measure(
    prompts: Sequence[Sequence[Message]], turns: Sequence[Turn]
  ) -> dict[str, list[float]]:
    found = find_off_topic(lm, dialogue, prompts, [turn['text'] for turn in turns])
    if found.threshold is None:  # a single prompt: nothing to compare with
      return {}
    return {
      'off_topic_rate': [float(flag) for flag in found.flags],
      'topic_score': [score.topic for score in found.scores],
    }

  return measure
