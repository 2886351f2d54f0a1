"""The chains of the generation benchmark: token ids and reply lengths, the same for every system.

This module imports only NumPy, so that it also works in a peer's own environment.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

REQUEST = (12, 30)  # least and most tokens of a critique or revision request
WARM = 12  # chains of a warm-up, for systems that compile nothing while they run
FIRST_ID = 16  # smaller ids are reserved for special tokens


@dataclasses.dataclass(frozen=True)
class ChainSettings:
  """Sizes of the chains, in tokens.

  Lengths are log-normal, rounded and clipped, and so as skewed as those of real texts.

  Attributes:
    chains: number of chains.
    rounds: rounds of critique and revision after the initial answer.
    prompt_median, reply_median: median lengths.
    prompt_sigma, reply_sigma: standard deviations of the logarithm of the length.
    longest_prompt, longest_reply: maximum lengths.
    prefix: length of the demonstrations at the start of every context.
  """

  chains: int = 24
  rounds: int = 2
  prompt_median: float = 56.0
  prompt_sigma: float = 0.5
  longest_prompt: int = 160
  reply_median: float = 17.0
  reply_sigma: float = 0.8
  longest_reply: int = 64
  prefix: int = 0

  def __post_init__(self):
    for name, minimum in (
      ('chains', 1),
      ('rounds', 0),
      ('longest_prompt', 1),
      ('longest_reply', 1),
      ('prefix', 0),
    ):
      if getattr(self, name) < minimum:
        raise ValueError(f'{name}={getattr(self, name)}; it must be at least {minimum}.')


@dataclasses.dataclass(frozen=True)
class Chain:
  """A conversation in which everything except the sampled tokens is fixed, also reply lengths.

  Attributes:
    id: unique among the chains.
    prompt: token ids.
    requests: token ids that follow each reply except the last.
    limits: number of tokens of each reply.
  """

  id: str
  prompt: list[int]
  requests: list[list[int]]
  limits: list[int]

  def context(self, prefix: Sequence[int], replies: Sequence[Sequence[int]]) -> list[int]:
    """Return the token ids of the conversation so far, which the next reply follows."""
    ids = [*prefix, *self.prompt]
    for reply, request in zip(replies, self.requests, strict=False):
      ids += [*reply, *request]
    return ids

  def context_length(self, turn: int, prefix: int) -> int:
    """Return the number of tokens in the context of a turn, with a prefix of `prefix` tokens."""
    before = sum(self.limits[:turn]) + sum(len(request) for request in self.requests[:turn])
    return prefix + len(self.prompt) + before


class Run(Protocol):
  """What the systems of the benchmark have in common."""

  def __call__(
    self, chains: list[Chain], prefix: list[int], batch: int, seed: int, warm: bool = False
  ) -> tuple[list[list[list[int]]], dict]:
    """Run chains.

    Args:
      chains: the chains.
      prefix: token ids at the start of every context.
      batch: chains in flight.
      seed: of sampling.
      warm: only warm up. A system that compiles nothing while it runs then runs `WARM` chains.

    Returns:
      The token ids of each chain's replies, and the system's statistics.
    """


def turn_names(rounds: int) -> list[str]:
  """Return 'initial', 'critique_1', 'revision_1' and so on."""
  pairs = [(f'critique_{n}', f'revision_{n}') for n in range(1, rounds + 1)]
  return ['initial', *(name for pair in pairs for name in pair)]


def draw(settings: ChainSettings, vocab_size: int, seed: int = 0) -> tuple[list[int], list[Chain]]:
  """Return a prefix and chains of random token ids, which depend only on the arguments."""
  rng = np.random.default_rng(seed)
  turns = 1 + 2 * settings.rounds

  def ids(count):
    return rng.integers(FIRST_ID, vocab_size, int(count)).tolist()

  def lengths(count, median, sigma, longest):
    samples = np.rint(rng.lognormal(np.log(median), sigma, count))
    return np.clip(samples, 1, longest).astype(int).tolist()

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
  """Return the number of tokens of the longest context with its reply."""
  return max(
    c.context_length(turn, prefix) + limit for c in chains for turn, limit in enumerate(c.limits)
  )


def batches(chains: Sequence[Chain], size: int) -> list[Sequence[Chain]]:
  """Split the chains into batches of `size`, in order; the last batch may be smaller."""
  return [chains[start : start + size] for start in range(0, len(chains), size)]


def run_rolling(
  chains: Sequence[Chain],
  prefix: Sequence[int],
  size: int,
  submit: Callable[[str, list[int], int], None],
  poll: Callable[[], list[tuple[str, list[int]]]],
) -> list[list[list[int]]]:
  """Keep `size` chains in flight, each with its next turn as soon as its reply has ended.

  Args:
    chains: the chains.
    prefix: token ids at the start of every context.
    size: chains in flight.
    submit: takes the id of a request, its context and the length of its reply.
    poll: lets the system work, and returns (id, tokens) of the requests that have ended since.

  Returns:
    The token ids of each chain's replies.
  """
  replies: dict[str, list[list[int]]] = {chain.id: [] for chain in chains}
  waiting, active = list(reversed(chains)), {}
  while waiting or active:
    while waiting and len(active) < size:
      chain = waiting.pop()
      active[f'{chain.id}/0'] = chain
      submit(f'{chain.id}/0', chain.context(prefix, []), chain.limits[0])
    for request, tokens in poll():
      chain = active.pop(request)
      done = replies[chain.id]
      done.append(list(tokens))
      if len(done) < len(chain.limits):
        active[f'{chain.id}/{len(done)}'] = chain
        context, limit = chain.context(prefix, done), chain.limits[len(done)]
        submit(f'{chain.id}/{len(done)}', context, limit)
  return [replies[chain.id] for chain in chains]


def quantiles(values: Sequence[int]) -> dict[str, float]:
  """Return the mean and quantiles of some lengths."""
  levels = {'p10': 0.1, 'p50': 0.5, 'p90': 0.9, 'p99': 0.99, 'max': 1.0}
  quantiles = {name: float(np.quantile(values, q)) for name, q in levels.items()}
  return {'mean': float(np.mean(values))} | quantiles


def describe(chains: Sequence[Chain], prefix: int) -> dict[str, dict[str, float]]:
  """Return quantiles of the lengths of prompts, replies and contexts, in tokens."""
  return {
    'prompt': quantiles([len(c.prompt) for c in chains]),
    'reply': quantiles([limit for c in chains for limit in c.limits]),
    'context': quantiles(
      [c.context_length(turn, prefix) for c in chains for turn in range(len(c.limits))]
    ),
  }
