"""Rates of responses that break a rule, and of responses that help, according to the scorer."""

from collections.abc import Sequence

from cai_jax.dialogue import Message
from cai_jax.evaluation.config import EvaluationConfig
from cai_jax.evaluation.registries import RESPONSE_MEASURES, ResponseMeasure, Turn
from cai_jax.runtime.errors import UserError
from cai_jax.scoring.loader import ModelLoader
from cai_jax.scoring.scorer import SCORERS, Scorer


@RESPONSE_MEASURES.register('verdicts')
def load_verdict_rates(config: EvaluationConfig, loader: ModelLoader) -> ResponseMeasure | None:
  """Return the measure of `config.scorer`, or None if that is 'none'."""
  scorer = SCORERS[config.scorer](loader)
  return None if scorer is None else verdict_rates(scorer, config.scorer)


def verdict_rates(scorer: Scorer, name: str = '') -> ResponseMeasure:
  """Return a measure with the columns `violation_rate` and `helpful_rate`, each 0 or 1.

  Args:
    scorer: judges the responses. The measure raises UserError if it does not return one verdict per
      response.
    name: name of the scorer, for that message.
  """

  def measure(
    prompts: Sequence[Sequence[Message]], turns: Sequence[Turn]
  ) -> dict[str, list[float]]:
    verdicts = scorer(prompts, [turn['text'] for turn in turns])
    if len(verdicts) != len(turns):
      raise UserError(
        f'The scorer {name!r} returned {len(verdicts)} verdicts for {len(turns)} responses. It '
        'must return one verdict per response.'
      )
    return {
      'violation_rate': [float(bool(verdict.violations)) for verdict in verdicts],
      'helpful_rate': [float(verdict.helpful) for verdict in verdicts],
    }

  return measure
