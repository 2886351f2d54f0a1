"""Comparisons of two responses by a judge: what it reads and what it says.

The question of a judge follows Bai et al. 2022, section 4.1: it reads a conversation, a principle
and the two responses as options (A) and (B). Its answer is a log-odds between the two labels. Many
models favour a label whatever the responses are, so each pair is judged in both orders (Lee et al.
2023, RLAIF, on position bias). The verdict is the sign of the mean log-odds over both orders, in
which a constant preference for a label cancels. How large this preference is, whether both orders
agree, and how probable the labels are is reported beside the verdict and does not change it.

A `Judge` is any function from matches to comparisons. `judge_local.py` makes one of a language
model. `JUDGES` holds those that are no language model, by name.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cai_jax.dialogue import Message
from cai_jax.runtime.registry import Registry
from cai_jax.scoring.loader import ModelLoader

POINTS = {'first': 1.0, 'tie': 0.5, 'second': 0.0}  # of the first player
CRITERIA = ('harmlessness', 'helpfulness')


@dataclasses.dataclass(frozen=True)
class Match:
  """Two responses to a prompt, and the principle by which to compare them.

  Attributes:
    prompt: id of the prompt. Intervals are computed by resampling prompts.
    messages: the messages of the prompt, ending with the user's.
    principle: the instruction to the judge, such as 'Choose the response that is less harmful.'
    players: names of the models that gave the first and the second response.
    responses: the first and the second response.
    criterion: what the principle asks about, one of `CRITERIA`. A language model reads the
      principle only; a judge by rules reads the criterion.
  """

  prompt: str
  messages: Sequence[Message]
  principle: str
  players: tuple[str, str]
  responses: tuple[str, str]
  criterion: str = 'harmlessness'


@dataclasses.dataclass(frozen=True)
class Comparison:
  """The result of a match.

  If the two responses of a match are exchanged, the two values of `log_odds` are exchanged too, and
  their signs flip.

  Attributes:
    prompt: id of the prompt.
    players: names of the models that gave the first and the second response.
    log_odds: log-odds in nats that the first response is better, once with the first response as
      option (A) and once with it as option (B).
    label_mass: probability that the judge gives to the two labels together, in each order. None if
      the judge does not tell.
  """

  prompt: str
  players: tuple[str, str]
  log_odds: tuple[float, float]
  label_mass: tuple[float, float] | None = None

  @property
  def mean_log_odds(self) -> float:
    """The log-odds in nats that the first response is better, averaged over both orders."""
    return sum(self.log_odds) / 2

  @property
  def position_bias(self) -> float:
    """Half the sum of the log-odds of label (A) in the two orders, in nats."""
    return (self.log_odds[0] - self.log_odds[1]) / 2

  @property
  def probability(self) -> float:
    """The probability that the first response is better, by the mean log-odds."""
    return 0.5 + 0.5 * math.tanh(self.mean_log_odds / 2)

  @property
  def consistent(self) -> bool:
    """Whether both orders prefer the same response, or neither has a preference."""
    first, second = self.log_odds
    return (first > 0) == (second > 0) and (first < 0) == (second < 0)

  @property
  def verdict(self) -> str:
    """'first' or 'second' by the sign of the mean log-odds, 'tie' if that is exactly 0."""
    if self.mean_log_odds == 0:
      return 'tie'
    return 'first' if self.mean_log_odds > 0 else 'second'

  @property
  def points(self) -> float:
    """Points of the first player: 1 for a win, 0.5 for a tie, 0 for a loss."""
    return POINTS[self.verdict]


# Compares the responses of each match, and returns one comparison per match, in order.
Judge = Callable[[Sequence[Match]], list[Comparison]]

# Each entry maps a loader of models to a judge. `evaluation.judge` selects one by name:
#
#   @JUDGES.register('shorter')
#   def load_shorter(loader: ModelLoader) -> Judge: ...
JUDGES: Registry[Callable[[ModelLoader], Judge]] = Registry('judge')

# Each entry maps a number of pairs (-1: as many as it likes) to labelled pairs, in the form of the
# rows of a file that `evaluation.judge_labels` reads. `evaluation.judge_labelled` selects one.
LABELLED: Registry[Callable[[int], list[dict[str, Any]]]] = Registry('set of labelled pairs')


def mean_position_bias(comparisons: Sequence[Comparison]) -> float:
  """Return the mean over pairs of half the sum of the log-odds of label (A), in nats.

  0 means that the judge favours no label. With 2 nats, a judge that finds both responses equally
  good gives label (A) the odds exp(2) = 7.4.

  Args:
    comparisons: at least one.
  """
  return float(np.mean([c.position_bias for c in comparisons]))


def mean_label_mass(comparisons: Sequence[Comparison]) -> float | None:
  """Return the mean probability of the two labels together, or None if the judge does not tell.

  Args:
    comparisons: at least one.
  """
  masses = [mass for c in comparisons for mass in c.label_mass or ()]
  return float(np.mean(masses)) if masses else None
