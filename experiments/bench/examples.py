"""The training benchmark's examples and steps, the same for every system.

It imports numpy alone, so that a peer in an environment of its own can use it too.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.bench.chains import FIRST_ID, quantiles

Rows = list[list[int]]  # a step: indices of the examples in each of its rows


class Example(NamedTuple):
  """A prompt and its response; the response is learnt."""

  tokens: list[int]
  prompt: int  # tokens of it


@dataclasses.dataclass(frozen=True)
class ExampleSettings:
  """Lengths of examples: log-normal parts; what is too long is drawn again, as it is dropped."""

  prompt_median: float  # tokens
  prompt_sigma: float  # standard deviation of the logarithm
  reply_median: float
  reply_sigma: float
  longest: int  # tokens of an example


# Of the embedded run's D_CAI (mean 40 tokens, 17 to learn, 78 at most), and of one with the spread
# of published dialogues: mean 200, a tenth over 350.
EMBEDDED = ExampleSettings(21, 0.34, 16, 0.39, 96)
DIALOGUES = ExampleSettings(100, 0.7, 60, 0.6, 512)


def draw(
  settings: ExampleSettings, count: int, vocab_size: int, seed: int = 0
) -> tuple[Example, ...]:
  """Examples of random token ids; a function of its arguments alone, the first few of any count."""
  rng = np.random.default_rng(seed)

  def length(median, sigma):
    return max(1, round(rng.lognormal(np.log(median), sigma)))

  examples = []
  while len(examples) < count:
    prompt = length(settings.prompt_median, settings.prompt_sigma)
    reply = length(settings.reply_median, settings.reply_sigma)
    if prompt + reply <= settings.longest:
      tokens = rng.integers(FIRST_ID, vocab_size, prompt + reply).tolist()
      examples.append(Example(tokens, prompt))
  return tuple(examples)


def describe(examples: Sequence[Example]) -> dict[str, dict[str, float]]:
  """Quantiles of the lengths of examples and of their responses, in tokens."""
  return {
    'tokens': quantiles([len(e.tokens) for e in examples]),
    'targets': quantiles([len(e.tokens) - e.prompt for e in examples]),
  }


def padded_steps(count: int, steps: int, seed: int = 0) -> list[Rows]:
  """Each of `count` examples once, one a row, in an order from the seed, in so many equal steps."""
  order = np.random.default_rng(seed).permutation(count)
  return [[[int(i)] for i in part] for part in np.array_split(order, steps)]


def largest(fits: Callable[[int], bool], low: int, high: int) -> int:
  """The largest count from `low` to `high` that fits; all below it do too."""
  while low < high:
    middle = (low + high + 1) // 2
    low, high = (middle, high) if fits(middle) else (low, middle - 1)
  return low


def common_steps(packed: Sequence[Rows], size: int, count: int) -> list[Rows]:
  """`count` steps of just `size` examples each, packed in rows, from steps with as many or more."""
  found = []
  for rows in packed:
    kept = [i for row in rows for i in row][:size]
    if len(kept) == size:
      cut = [[i for i in row if i in kept] for row in rows]
      found.append([row for row in cut if row])
  if not found:
    raise ValueError(f'no step has {size} examples.')
  return [found[i % len(found)] for i in range(count)]


def one_a_row(steps: Sequence[Rows]) -> list[Rows]:
  """The same steps, padded instead of packed."""
  return [[[i] for row in rows for i in row] for rows in steps]


def split(rows: Rows, size: int) -> list[Rows]:
  """A step's rows in equal parts of at most `size`; 0 is all."""
  parts = -(-len(rows) // size) if size else 1
  at = np.linspace(0, len(rows), parts + 1).round().astype(int)
  return [rows[a:b] for a, b in zip(at[:-1], at[1:], strict=True)]


def pad(examples: Sequence[Example], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(tokens, real, learnt), i32[B,T], of examples filled up to `length` on the right with 0."""
  tokens, real, learnt = (np.zeros((len(examples), length), np.int32) for _ in range(3))
  for row, example in enumerate(examples):
    end = len(example.tokens)
    tokens[row, :end] = example.tokens
    real[row, :end] = 1
    learnt[row, example.prompt : end] = 1
  return tokens, real, learnt
