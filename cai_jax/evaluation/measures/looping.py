"""The share of responses that repeat themselves."""

from collections.abc import Sequence

from cai_jax.data.text_rules import has_loop, split_words
from cai_jax.dialogue import Message
from cai_jax.evaluation.config import EvaluationConfig
from cai_jax.evaluation.registries import RESPONSE_MEASURES, ResponseMeasure, Turn
from cai_jax.scoring.loader import ModelLoader


@RESPONSE_MEASURES.register('looping')
def load_looping(config: EvaluationConfig, loader: ModelLoader) -> ResponseMeasure | None:
  """Return `measure_looping` if the config asks for 'looping'."""
  del loader
  return measure_looping if 'looping' in config.active_scores else None


def measure_looping(
  prompts: Sequence[Sequence[Message]], turns: Sequence[Turn]
) -> dict[str, list[float]]:
  """Return the column `looping_rate`: 1 for a response with a loop, see `text_rules.has_loop`.

  Args:
    prompts: the messages that each turn answers.
    turns: the responses, with `text`.
  """
  del prompts
  texts = [turn['text'] for turn in turns]
  return {'looping_rate': [float(has_loop(text, split_words(text))) for text in texts]}
