"""Which of several responses to a prompt are compared."""

import itertools
import random
from collections.abc import Callable

from cai_jax.runtime.registry import Registry

Pair = tuple[int, int]  # indices of two responses, the smaller one first

# Maps the number of responses and a random generator of the prompt to the pairs to compare.
PAIRINGS: Registry[Callable[[int, random.Random], list[Pair]]] = Registry('choice of pairs')


@PAIRINGS.register('all')
def pair_all(count: int, rng: random.Random) -> list[Pair]:
  """Return all pairs, count · (count - 1) / 2 of them.

  Args:
    count: number of responses.
    rng: not used.
  """
  del rng
  return list(itertools.combinations(range(count), 2))


@PAIRINGS.register('first')
def pair_with_first(count: int, rng: random.Random) -> list[Pair]:
  """Return the pairs of the first response with each other one.

  Args:
    count: number of responses.
    rng: not used.
  """
  del rng
  return [(0, other) for other in range(1, count)]


@PAIRINGS.register('random')
def pair_at_random(count: int, rng: random.Random) -> list[Pair]:
  """Return one pair, each with the same probability.

  Args:
    count: number of responses.
    rng: draws the pair.
  """
  first, second = sorted(rng.sample(range(count), 2))
  return [(first, second)]
