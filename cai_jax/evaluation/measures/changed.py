"""The share of responses that differ from the answer of M_θ to the same prompt."""

from collections.abc import Sequence

from cai_jax.dialogue import Message
from cai_jax.evaluation.config import EvaluationConfig
from cai_jax.evaluation.registries import RESPONSE_MEASURES, ResponseMeasure, Turn
from cai_jax.scoring.loader import ModelLoader


@RESPONSE_MEASURES.register('changed')
def load_changed(config: EvaluationConfig, loader: ModelLoader) -> ResponseMeasure | None:
  """Return `measure_changed` if the config asks for 'changed'."""
  del loader
  return measure_changed if 'changed' in config.active_scores else None


def measure_changed(
  prompts: Sequence[Sequence[Message]], turns: Sequence[Turn]
) -> dict[str, list[float | None]]:
  """Return the column `changed_rate`: 1 for a response with another text than M_θ's answer.

  White space counts as one space. The answers of M_θ themselves have None. The column is absent if
  the turns do not have references.

  Args:
    prompts: the messages that each turn answers.
    turns: the responses, with `text` and `reference`, the text of M_θ's answer or None.
  """
  del prompts
  if not all('reference' in turn for turn in turns):
    return {}
  return {'changed_rate': [_differs(turn['text'], turn['reference']) for turn in turns]}


def _differs(text: str, reference: str | None) -> float | None:
  return None if reference is None else float(text.split() != reference.split())
