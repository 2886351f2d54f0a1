"""Compare two responses: by a language model, which is asked in both orders, or by a judge."""

import dataclasses
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

from cai_jax.constitution import Principle
from cai_jax.dialogue import Message
from cai_jax.feedback.comparisons.asking import Answer, FeedbackModel
from cai_jax.scoring.judge import Judge, Match


@dataclasses.dataclass(frozen=True)
class Reading:
  """The answer to one question about two responses.

  Attributes:
    principle: id of the principle.
    option_a: the response, 0 or 1, that was shown as option (A).
    probability: that the first response is better, after clamping.
    answer: what the model answered.
  """

  principle: str
  option_a: int
  probability: float
  answer: Answer


# Compares two responses, called as `compare(name, messages, principles, responses, is_sampled)`.
Compare = Callable[
  [str, Sequence[Message], Sequence[Principle], tuple[str, str], bool],
  Generator[Any, Any, list[Reading]],
]


def compare_with_model(model: FeedbackModel, samples: int, clamp: tuple[float, float]) -> Compare:
  """Return a function that asks a language model under each principle and in both orders.

  Args:
    model: the feedback model.
    samples: number of times that each question is asked.
    clamp: least and largest probability of option (A) after a chain of thought. Bai et al. (2022,
      section 4.1) clamp to 40–60 %, because such answers are overconfident.
  """
  low, high = clamp if model.thoughts else (0.0, 1.0)

  def compare(
    name: str,
    messages: Sequence[Message],
    principles: Sequence[Principle],
    responses: tuple[str, str],
    is_sampled: bool,
  ) -> Generator[Any, Any, list[Reading]]:
    readings = []
    for number, principle in enumerate(principles, 1):
      for option_a, options in enumerate((responses, responses[::-1])):
        for sample in range(1, samples + 1):
          turn = f'{name}_principle_{number}_order_{option_a + 1}_sample_{sample}'
          answer = yield from model.ask(turn, messages, principle, options, is_sampled)
          clamped = min(max(answer.probability, low), high)
          probability = 1 - clamped if option_a else clamped
          readings.append(Reading(principle.id, option_a, probability, answer))
    return readings

  return compare


def compare_with_judge(judge: Judge) -> Compare:
  """Return a function that asks a judge, such as the oracle of the embedded world.

  A judge is no language model with turns: it answers in the process of the run. It may read the
  criterion 'harmlessness' in place of the principle.

  Args:
    judge: the judge. `judging.journaled_judge` returns one that is asked nothing twice.
  """

  def compare(
    name: str,
    messages: Sequence[Message],
    principles: Sequence[Principle],
    responses: tuple[str, str],
    is_sampled: bool,
  ) -> Generator[Any, Any, list[Reading]]:
    yield from ()  # no turn
    players = ('first', 'second')
    matches = [Match(name, messages, p.comparison, players, responses) for p in principles]
    readings = []
    for principle, comparison in zip(principles, judge(matches), strict=True):
      masses = comparison.label_mass or (None, None)
      for option_a, (odds, mass) in enumerate(zip(comparison.log_odds, masses, strict=True)):
        probability = 0.5 + 0.5 * math.tanh(odds / 2)
        of_a = 1 - probability if option_a else probability
        readings.append(Reading(principle.id, option_a, probability, Answer(of_a, mass=mass)))
    return readings

  return compare
