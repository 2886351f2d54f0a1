"""The pairs of the preference benchmark, the same for every system.

A pair is two examples of the training benchmark with one prompt: the chosen response, then the
rejected one. Pair i of a sequence has the examples 2 i and 2 i + 1, so the operations of workers
that store examples and steps serve pairs, too. The indices in steps are those of pairs.

This module imports only NumPy, so that it also works in a peer's own environment.
"""

from collections.abc import Sequence

import numpy as np

from experiments.bench.chains import FIRST_ID
from experiments.bench.examples import Example, ExampleSettings

Pair = tuple[Example, Example]  # chosen, rejected


def draw(
  settings: ExampleSettings, count: int, vocab_size: int, seed: int = 0
) -> tuple[Example, ...]:
  """Return the examples of `count` pairs of random token ids, which depend only on the arguments.

  A larger count adds pairs at the end. Both responses of a pair have lengths of their own.

  Args:
    settings: lengths; a pair with a side over `longest` is replaced by another one.
    count: number of pairs.
    vocab_size: number of token ids.
    seed: of the draw.
  """
  rng = np.random.default_rng(seed)

  def length(median, sigma):
    return max(1, round(rng.lognormal(np.log(median), sigma)))

  examples: list[Example] = []
  while len(examples) < 2 * count:
    prompt = length(settings.prompt_median, settings.prompt_sigma)
    replies = [length(settings.reply_median, settings.reply_sigma) for _ in range(2)]
    if prompt + max(replies) <= settings.longest:
      tokens = rng.integers(FIRST_ID, vocab_size, prompt).tolist()
      for reply in replies:
        answer = rng.integers(FIRST_ID, vocab_size, reply).tolist()
        examples.append(Example(tokens + answer, prompt))
  return tuple(examples)


def pair_up(examples: Sequence[Example]) -> list[Pair]:
  """Return the pairs that consecutive examples form."""
  return list(zip(examples[::2], examples[1::2], strict=True))


def pair_lengths(examples: Sequence[Example], shared: bool = False) -> list[int]:
  """Return the number of tokens of both sides of each pair.

  Args:
    examples: those of all pairs.
    shared: whether the second side leaves out what it shares with the first one. That is the prompt
      without its last token, from which each side predicts the first token of its response.
  """
  return [len(a.tokens) + len(b.tokens) - shared * (a.prompt - 1) for a, b in pair_up(examples)]
