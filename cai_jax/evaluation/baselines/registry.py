"""The registry of baselines, and their two kinds."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cai_jax.constitution import Constitution
from cai_jax.data.prompts import Prompt
from cai_jax.dialogue import Message
from cai_jax.runtime.registry import Registry
from cai_jax.scoring.judge import Comparison

# A baseline that changes prompts: maps a constitution and the held-out prompts to the prompts that
# M_θ answers instead, with the same ids in the same order.
Change = Callable[[Constitution, Sequence[Prompt]], list[Prompt]]


# Maps conversations that end with a reply to the reward of each.
Reward = Callable[[Sequence[Sequence[Message]]], Sequence[float]]
BY_JUDGE, BY_REWARD = 'judge', 'reward'  # what a selection chooses by
Choose = Callable[
  [Any, Sequence[Sequence[Mapping[str, Any]]], Mapping[str, Sequence[str]], np.random.Generator],
  tuple[list[int], list[Comparison]],
]


@dataclasses.dataclass(frozen=True)
class Selection:
  """A baseline that chooses among several responses of M_θ to each held-out prompt.

  The responses are drawn from M_θ under the ids of `repeat_prompts`, the first under the prompt's
  own id, so it is the answer of M_θ that the table shows as `base`.

  Attributes:
    choose: maps a judge or a reward model (see `by`), the candidates of each prompt (rows of
      responses, in the order in which they were drawn), the principles by kind of prompt and a
      generator for their draw to the index of the chosen candidate of each prompt, and the
      comparisons that the judge made.
    count: maps the row of M_θ, with its chain, and the candidates of its prompt to the number of
      candidates that take part, the first ones. By default all do.
    by: what `choose` gets: `BY_JUDGE`, a `Judge`; or `BY_REWARD`, a `Reward`.
  """

  choose: Choose
  count: Callable[[Mapping[str, Any], Sequence[Mapping[str, Any]]], int] = lambda row, candidates: (
    len(candidates)
  )
  by: str = BY_JUDGE


BASELINES: Registry[Change | Selection] = Registry('baseline')
