"""The best of n responses of M_θ to each prompt, chosen by the judge, in place of training."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cai_jax.evaluation.baselines.registry import BASELINES, Selection
from cai_jax.scoring.judge import Comparison, Judge, Match

CRITERION = {'harmful': 'harmlessness', 'helpful': 'helpfulness'}  # by kind of prompt


def choose_best(
  judge: Judge,
  candidates: Sequence[Sequence[Mapping[str, Any]]],
  principles: Mapping[str, Sequence[str]],
  rng: np.random.Generator,
) -> tuple[list[int], list[Comparison]]:
  """Choose the best response to each prompt in a knock-out of at most n-1 comparisons.

  Neighbours meet, the winners meet again, and so on. A tie keeps the response that was drawn first.
  The judge is not asked about equal responses, and a blank response loses without being read.

  Args:
    judge: the judge.
    candidates: for each prompt, the rows of the responses, at least one.
    principles: for each kind of prompt, 'harmful' and 'helpful', the principles of which one is
      drawn for each prompt.
    rng: draws the principles.

  Returns:
    For each prompt the index of the best response, and all comparisons.
  """
  drawn = [principles[rows[0]['kind']] for rows in candidates]
  drawn_texts = [texts[int(rng.integers(len(texts)))] for texts in drawn]
  alive = [list(range(len(rows))) for rows in candidates]
  comparisons: list[Comparison] = []
  while any(len(left) > 1 for left in alive):
    matches, asked = [], []  # of this round, and (prompt, pair) of each match
    winners: list[dict[int, int]] = [{} for _ in alive]  # first of a pair → winner
    for index, left in enumerate(alive):
      for first, second in zip(left[::2], left[1::2], strict=False):
        rows = candidates[index]
        texts = rows[first]['initial']['text'], rows[second]['initial']['text']
        if not texts[1].strip() or texts[0] == texts[1]:
          winners[index][first] = first
        elif not texts[0].strip():
          winners[index][first] = second
        else:
          row = rows[0]
          match = Match(
            row['id'],
            row['prompt'],
            drawn_texts[index],
            (str(first + 1), str(second + 1)),
            texts,
            CRITERION[row['kind']],
          )
          matches.append(match)
          asked.append((index, first, second))
    verdicts = judge(matches) if matches else []
    for (index, first, second), verdict in zip(asked, verdicts, strict=True):
      winners[index][first] = second if verdict.verdict == 'second' else first
    comparisons += verdicts
    alive = [
      [winners[index].get(first, first) for first in left[::2]] for index, left in enumerate(alive)
    ]
  return [left[0] for left in alive], comparisons


BASELINES.register('best_of_n')(Selection(choose_best))
