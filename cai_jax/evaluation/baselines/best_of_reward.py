"""The best of n responses of M_θ to each prompt by a reward model, in place of training."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cai_jax.evaluation.baselines.registry import BASELINES, BY_REWARD, Reward, Selection
from cai_jax.scoring.judge import Comparison
from cai_jax.scoring.reward import append_replies


def choose_highest(
  reward: Reward,
  candidates: Sequence[Sequence[Mapping[str, Any]]],
  principles: Mapping[str, Sequence[str]],
  rng: np.random.Generator,
) -> tuple[list[int], list[Comparison]]:
  """Choose the response to each prompt that has the highest reward.

  Of equal rewards the first wins. A blank response loses without being read.

  Args:
    reward: the reward model.
    candidates: for each prompt, the rows of the responses, at least one.
    principles: not used; a reward model reads none.
    rng: not used.

  Returns:
    For each prompt the index of the best response, and no comparisons.
  """
  del principles, rng
  read = [
    (number, index)
    for number, rows in enumerate(candidates)
    for index, row in enumerate(rows)
    if row['initial']['text'].strip()
  ]
  rows = [candidates[number][index] for number, index in read]
  texts = [row['initial']['text'] for row in rows]
  rewards = reward(append_replies([row['prompt'] for row in rows], texts)) if rows else []
  best: dict[int, tuple[float, int]] = {}
  for (number, index), value in zip(read, rewards, strict=True):
    if number not in best or value > best[number][0]:
      best[number] = value, index
  return [best[number][1] if number in best else 0 for number in range(len(candidates))], []


BASELINES.register('best_of_reward')(Selection(choose_highest, by=BY_REWARD))
