"""The chains of the generation benchmark: token ids and reply lengths, the same for every system.

It imports numpy alone, so that a peer in an environment of its own can use it too.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

REQUEST = (12, 30)  # tokens of a critique or revision request, drawn evenly
FIRST_ID = 16  # ids below are left to special tokens


@dataclasses.dataclass(frozen=True)
class ChainSettings:
  """Sizes of the chains. Lengths are log-normal, rounded and clipped: skewed, as real ones are."""

  chains: int = 24
  rounds: int = 2  # of critique and revision, after the initial answer
  prompt_median: float = 56.0  # tokens
  prompt_sigma: float = 0.5  # standard deviation of the logarithm
  longest_prompt: int = 160
  reply_median: float = 17.0  # tokens
  reply_sigma: float = 0.8
  longest_reply: int = 64
  prefix: int = 0  # tokens of the demonstrations that stand in front of every context

  def __post_init__(self):
    for name, least in (
      ('chains', 1),
      ('rounds', 0),
      ('longest_prompt', 1),
      ('longest_reply', 1),
      ('prefix', 0),
    ):
      if getattr(self, name) < least:
        raise ValueError(f'chains: {name}={getattr(self, name)}; it must be at least {least}.')


@dataclasses.dataclass(frozen=True)
class Chain:
  """A conversation with all fixed but the sampled tokens; the lengths of its replies are forced."""

  id: str
  prompt: list[int]  # token ids
  requests: list[list[int]]  # token ids that follow each reply but the last
  limits: list[int]  # tokens of each reply

  def context(self, prefix: Sequence[int], replies: Sequence[Sequence[int]]) -> list[int]:
    """Token ids that the next reply follows: the whole chat so far."""
    ids = [*prefix, *self.prompt]
    for reply, request in zip(replies, self.requests, strict=False):
      ids += [*reply, *request]
    return ids

  def context_length(self, turn: int, prefix: int) -> int:
    """Tokens of the context of a turn, behind a prefix of that many."""
    before = sum(self.limits[:turn]) + sum(len(request) for request in self.requests[:turn])
    return prefix + len(self.prompt) + before


def turn_names(rounds: int) -> list[str]:
  """'initial', 'critique_1', 'revision_1', and so on."""
  pairs = [(f'critique_{n}', f'revision_{n}') for n in range(1, rounds + 1)]
  return ['initial', *(name for pair in pairs for name in pair)]


def draw(settings: ChainSettings, vocab_size: int, seed: int = 0) -> tuple[list[int], list[Chain]]:
  """(prefix, chains) of random token ids; a function of its arguments alone."""
  rng = np.random.default_rng(seed)
  turns = 1 + 2 * settings.rounds

  def ids(count):
    return rng.integers(FIRST_ID, vocab_size, int(count)).tolist()

  def lengths(count, median, sigma, longest):
    drawn = np.rint(rng.lognormal(np.log(median), sigma, count))
    return np.clip(drawn, 1, longest).astype(int).tolist()

  prompts = lengths(
    settings.chains, settings.prompt_median, settings.prompt_sigma, settings.longest_prompt
  )
  chains = [
    Chain(
      id=f'chain_{number}',
      prompt=ids(length),
      requests=[ids(n) for n in rng.integers(REQUEST[0], REQUEST[1] + 1, turns - 1)],
      limits=lengths(turns, settings.reply_median, settings.reply_sigma, settings.longest_reply),
    )
    for number, length in enumerate(prompts)
  ]
  return ids(settings.prefix), chains


def longest(chains: Sequence[Chain], prefix: int) -> int:
  """Tokens of the longest context and reply of any chain."""
  return max(
    c.context_length(turn, prefix) + limit for c in chains for turn, limit in enumerate(c.limits)
  )


def batches(chains: Sequence[Chain], size: int) -> list[Sequence[Chain]]:
  """The chains in order, `size` at a time; the last batch may be smaller."""
  return [chains[start : start + size] for start in range(0, len(chains), size)]


def quantiles(values: Sequence[int]) -> dict[str, float]:
  """Mean and quantiles of some lengths."""
  named = {'p10': 0.1, 'p50': 0.5, 'p90': 0.9, 'p99': 0.99, 'max': 1.0}
  found = {name: float(np.quantile(values, q)) for name, q in named.items()}
  return {'mean': float(np.mean(values))} | found


def describe(chains: Sequence[Chain], prefix: int) -> dict[str, dict[str, float]]:
  """Quantiles of the lengths of prompts, replies and contexts, in tokens."""
  return {
    'prompt': quantiles([len(c.prompt) for c in chains]),
    'reply': quantiles([limit for c in chains for limit in c.limits]),
    'context': quantiles(
      [c.context_length(turn, prefix) for c in chains for turn in range(len(c.limits))]
    ),
  }
