"""Scores of responses by the rubrics of a judge."""

from collections.abc import Sequence

from cai_jax.dialogue import Message
from cai_jax.evaluation.config import EvaluationConfig
from cai_jax.evaluation.registries import RESPONSE_MEASURES, ResponseMeasure, Turn
from cai_jax.scoring.loader import ModelLoader
from cai_jax.scoring.rubrics.raters import Rater, local_rater, remote_rater
from cai_jax.scoring.rubrics.rubric import RUBRICS


@RESPONSE_MEASURES.register('rubrics')
def load_rubrics(config: EvaluationConfig, loader: ModelLoader) -> ResponseMeasure | None:
  """Return a measure with the columns of each rubric, or None if the config names none.

  The judge is loaded when it is asked. What it needs is checked in
  `pipeline/evaluation_checks.py`.
  """
  if not config.rubrics:
    return None

  def measure(
    prompts: Sequence[Sequence[Message]], turns: Sequence[Turn]
  ) -> dict[str, list[float | None]]:
    rater, texts = _load_rater(config, loader), [turn['text'] for turn in turns]
    columns: dict[str, list[float | None]] = {}
    for rubric in map(RUBRICS.__getitem__, config.rubrics):
      found = [
        None if labels is None else rubric.columns(labels)
        for labels in rater(rubric, prompts, texts)
      ]
      for name in rubric.names:
        columns[name] = [None if numbers is None else numbers[name] for numbers in found]
    return columns

  return measure


def _load_rater(config: EvaluationConfig, loader: ModelLoader) -> Rater:
  """Return the judge of an evaluation as a rater."""
  if config.judge_remote:
    client = loader.client(config.judge_remote.as_text(), 'judge')
    return remote_rater(client, config.judge_reasoning)
  lm = loader.language_model(config.judge)
  return local_rater(lm, loader.rating_journal, loader.template_options, config.style)
