"""The best of as many responses of M_θ as take the tokens of the prompt's chain of revisions."""

from collections.abc import Mapping, Sequence
from typing import Any

from cai_jax.data.d_cai import round_tokens
from cai_jax.evaluation.baselines.best_of_n import choose_best
from cai_jax.evaluation.baselines.registry import BASELINES, Selection


def count_affordable(row: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]]) -> int:
  """Return how many candidates take no more tokens together than a chain of critique and revision.

  Only sampled tokens count: those of the initial response, the critiques and the revisions on one
  side, and those of the candidates on the other. What the judge reads is not counted.

  Args:
    row: the row of M_θ, with the rounds of its chain. Without rounds the chain is one response.
    candidates: rows of responses to its prompt, in the order in which they were drawn.

  Returns:
    The number of candidates, at least 1: the first is the initial response itself.
  """
  left = row['initial']['num_tokens'] + sum(map(round_tokens, row['rounds']))
  for number, candidate in enumerate(candidates):
    left -= candidate['initial']['num_tokens']
    if left < 0:
      return max(number, 1)
  return len(candidates)


BASELINES.register('best_of_tokens')(Selection(choose_best, count_affordable))
