"""How often a reward model prefers the better response of labelled pairs."""

from collections.abc import Callable, Sequence
from typing import Any

from cai_jax.dialogue import Message
from cai_jax.evaluation.config import LESS_HARMFUL, EvaluationConfig
from cai_jax.evaluation.intervals import rate_interval
from cai_jax.evaluation.judge_labels import read_labelled
from cai_jax.evaluation.registries import COMPARISONS, ModelComparison, Row
from cai_jax.scoring.judge import Match
from cai_jax.scoring.loader import ModelLoader
from cai_jax.scoring.reward import append_replies


@COMPARISONS.register('reward_labelled')
def create_reward_accuracy(config: EvaluationConfig) -> ModelComparison | None:
  """Return the measure, or None if the config names no labelled pairs for the reward model."""
  if not config.reward_labelled:
    return None

  def compare(
    loader: ModelLoader, base: Sequence[Row], aligned: Sequence[Row], seed: int
  ) -> dict[str, Any]:
    del base, aligned, seed
    model = loader.reward_model(config.reward_model, config.style)
    label = model.label_index(config.reward_label or None)
    pairs = read_labelled(config.reward_labelled, LESS_HARMFUL, config.judge_labelled_limit)
    result = measure_accuracy(lambda texts: model.scores(texts, label), pairs.matches)
    return result | {'left_out': pairs.left_out}

  return ModelComparison(compare, describe)


def measure_accuracy(
  score: Callable[[Sequence[Sequence[Message]]], Sequence[float]], matches: Sequence[Match]
) -> dict[str, Any]:
  """Return the share of pairs whose better response has the higher reward.

  Args:
    score: maps conversations that end with a reply to rewards.
    matches: pairs with the better response first, at least one.

  Returns:
    `count`, `accuracy` (a tie is wrong), its 95 % Wilson interval `accuracy_interval`, and
    `margin`, the mean reward of the better response minus that of the worse.
  """
  messages = [list(match.messages) for match in matches]
  better, worse = (
    score(append_replies(messages, [match.responses[side] for match in matches])) for side in (0, 1)
  )
  differences = [first - second for first, second in zip(better, worse, strict=True)]
  right = [float(difference > 0) for difference in differences]
  return {
    'count': len(right),
    'accuracy': sum(right) / len(right),
    'accuracy_interval': list(rate_interval(right)),
    'margin': sum(differences) / len(differences),
  }


def describe(result: dict[str, Any]) -> list[str]:
  """Return a line of text with the accuracy.

  Args:
    result: the result of `measure_accuracy`, with the numbers of rows that were `left_out`.
  """
  low, high = result['accuracy_interval']
  left_out = sum(result.get('left_out', {}).values())  # earlier versions did not store it
  others = f'; {left_out} rows are no pair' if left_out else ''
  return [
    f'reward model: prefers the better response in {100 * result["accuracy"]:.1f} % '
    f'[{100 * low:.1f}, {100 * high:.1f}] of {result["count"]} labelled pairs{others}'
  ]
