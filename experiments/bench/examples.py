"""The training benchmark's examples and steps, the same for every system.

This module imports only NumPy, so that it also works in a peer's own environment.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.bench.chains import FIRST_ID, quantiles

Rows = list[list[int]]  # of a step: the indices of the examples in each row


class Example(NamedTuple):
  """A prompt and its response, which is the target."""

  tokens: list[int]
  prompt: int  # number of tokens of the prompt


@dataclasses.dataclass(frozen=True)
class ExampleSettings:
  """Lengths of examples, in tokens.

  Prompts and replies are log-normal. An example that is too long is replaced by another, because
  training drops such examples.

  Attributes:
    prompt_median, reply_median: median lengths.
    prompt_sigma, reply_sigma: standard deviations of the logarithm of the length.
    longest: maximum length of an example.
  """

  prompt_median: float
  prompt_sigma: float
  reply_median: float
  reply_sigma: float
  longest: int


# EMBEDDED has the lengths of the embedded run's D_CAI (mean 40 tokens, of which 17 are targets, at
# most 78). DIALOGUES has the spread of published dialogues: mean 200, and a tenth over 350.
EMBEDDED = ExampleSettings(21, 0.34, 16, 0.39, 96)
DIALOGUES = ExampleSettings(100, 0.7, 60, 0.6, 512)
LONG_DIALOGUES = ExampleSettings(400, 0.7, 250, 0.6, 2048)


def draw(
  settings: ExampleSettings, count: int, vocab_size: int, seed: int = 0
) -> tuple[Example, ...]:
  """Return `count` examples of random token ids, which depend only on the arguments.

  A larger count adds examples at the end.
  """
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
  """Return quantiles of the lengths of examples and of their responses, in tokens."""
  return {
    'tokens': quantiles([len(e.tokens) for e in examples]),
    'targets': quantiles([len(e.tokens) - e.prompt for e in examples]),
  }


def padded_steps(count: int, steps: int, seed: int = 0) -> list[Rows]:
  """Return `steps` equal steps over `count` examples, one example per row, in random order."""
  order = np.random.default_rng(seed).permutation(count)
  return [[[int(i)] for i in part] for part in np.array_split(order, steps)]


def largest_fit(fits: Callable[[int], bool], low: int, high: int) -> int:
  """Return the largest count in [low, high] that fits, given that all smaller ones do too."""
  while low < high:
    middle = (low + high + 1) // 2
    low, high = (middle, high) if fits(middle) else (low, middle - 1)
  return low


def common_steps(packed: Sequence[Rows], size: int, count: int) -> list[Rows]:
  """Return `count` packed steps with exactly `size` examples each.

  Args:
    packed: packed steps. Those with fewer examples are skipped and the others are cut.
    size: examples per step.
    count: number of steps; the same steps repeat if there are too few.

  Raises:
    ValueError: if every step has fewer than `size` examples.
  """
  steps = []
  for rows in packed:
    kept = [i for row in rows for i in row][:size]
    if len(kept) == size:
      cut = [[i for i in row if i in kept] for row in rows]
      steps.append([row for row in cut if row])
  if not steps:
    raise ValueError(f'no step has {size} examples.')
  return [steps[i % len(steps)] for i in range(count)]


def unpack_rows(steps: Sequence[Rows]) -> list[Rows]:
  """Return the same steps with one example per row."""
  return [[[i] for row in rows for i in row] for rows in steps]


def split(rows: Rows, size: int) -> list[Rows]:
  """Split a step's rows into equal parts of at most `size` rows; 0 means one part."""
  parts = -(-len(rows) // size) if size else 1
  at = np.linspace(0, len(rows), parts + 1).round().astype(int)
  return [rows[a:b] for a, b in zip(at[:-1], at[1:], strict=True)]


def pad(examples: Sequence[Example], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Pad examples with zeros on the right.

  Returns:
    tokens, real (1 where there is a token) and targets (1 where the token is a target), i32[B,T].
  """
  tokens, real, targets = (np.zeros((len(examples), length), np.int32) for _ in range(3))
  for row, example in enumerate(examples):
    end = len(example.tokens)
    tokens[row, :end] = example.tokens
    real[row, :end] = 1
    targets[row, example.prompt : end] = 1
  return tokens, real, targets
