"""Intervals and p-values of rates, means and paired differences.

  values              interval of the mean          interval of a paired difference   p-value
  0 or 1              Wilson 1927                   Tango 1998                        exact McNemar
  in [0, 1]           Wilson, effective number      Student's t                       sign flips
  any other           Student's t                   Student's t                       sign flips

One value belongs to one prompt, and prompts are independent. `estimates` is for several seeds.
The intervals of 0 and 1 values are never a point: 0 of 400 is [0, 0.0095].

`tests/test_intervals.py` measures the coverage of 95 % intervals with 400 prompts, averaged over
true rates from p / 2 to 2 p, and for pairs over arms with the same rate and arms whose rates differ
by the factor 0.7:

- Wilson: 95.9 % at p = 0.005, 95.1 % at 0.05, 95.0 % at 0.5.
- Tango at p = 0.05 and 0.5: 95 %, whether the arms are independent or correlated with 0.3 or 0.7.
- Tango at p = 0.005: 96 to 97 % for independent arms, 97 to 98 % with correlation 0.3, and 99 %
  with 0.7. In the last case the arms differ in about 1.2 prompts. Fewer than 4 prompts that differ
  show no difference in any two-sided test, so hardly an interval misses zero. Newcombe's method 10
  (1998) covers 98, 99 and 100 % in these three cases.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from cai_jax.scoring.wilson import wilson_interval

SIGN_FLIPS = 20000
_FLIP_BLOCK = 2**22  # signs drawn at once


class Estimate(NamedTuple):
  """An estimate, and the lower and upper end of its interval."""

  value: float
  low: float
  high: float


def rate_interval(values: ArrayLike, level: float = 0.95) -> tuple[float, float]:
  """Return the interval of the mean of values in [0, 1].

  For values that are 0 or 1 this is Wilson's interval. Others, such as a tie that counts ½, have
  a smaller variance s² than 0 and 1 values with the same mean m. Wilson's interval then uses the
  effective number of trials N m (1 - m) / s² (Kish 1965, section 8.2; Franco et al. 2019), and N if
  all values are equal.

  Args:
    values: f64[N], one number per prompt, in [0, 1].
    level: coverage of the interval, in (0, 1).

  Raises:
    ValueError: if there are no values, or one is outside [0, 1].
  """
  numbers = _as_numbers(values)
  if numbers.min() < 0 or numbers.max() > 1:
    raise ValueError(f'Values are in {numbers.min()}..{numbers.max()}. They must be in [0, 1].')
  mean, variance = numbers.mean(), numbers.var()
  if is_binary(numbers) or not variance:
    return wilson_interval(numbers.sum(), numbers.size, level)
  count = numbers.size * mean * (1 - mean) / variance
  return wilson_interval(mean * count, count, level)


def mean_interval(values: ArrayLike, level: float = 0.95) -> tuple[float, float]:
  """Return the interval of the mean: `rate_interval` in [0, 1], else Student's t interval.

  Args:
    values: f64[N], one number per prompt. A single number outside [0, 1] says nothing about
      variation: its interval is the number itself.
    level: coverage of the interval, in (0, 1).

  Raises:
    ValueError: if there are no values.
  """
  numbers = _as_numbers(values)
  if numbers.min() >= 0 and numbers.max() <= 1:
    return rate_interval(numbers, level)
  mean = float(numbers.mean())
  half = _t_half_width(numbers, level)
  return mean - half, mean + half


def paired_difference(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Estimate:
  """Return the mean of a - b over prompts, with its interval.

  Args:
    a: f64[N], one number per prompt.
    b: f64[N], numbers of the same prompts in the same order.
    level: coverage of the interval, in (0, 1).

  Raises:
    ValueError: if there are no values, or not equally many.
  """
  first, second = _as_pair(a, b)
  if is_binary(first) and is_binary(second):
    gains = int(np.sum(first > second))
    losses = int(np.sum(first < second))
    return Estimate(
      (gains - losses) / first.size, *tango_interval(gains, losses, first.size, level)
    )
  differences = first - second
  value, half = float(differences.mean()), _t_half_width(differences, level)
  return Estimate(value, value - half, value + half)


def tango_interval(
  gains: float, losses: float, count: float, level: float = 0.95
) -> tuple[float, float]:
  """Return the score interval of the difference of two paired proportions (Tango 1998).

  Its ends are the differences d with |g - l - N d| = z √(N (2 q + d (1 - d))), where q is the
  maximum likelihood estimate of P(loss) given d (equations 8 and 9 of the paper).

  Args:
    gains: number of prompts g in which only the first arm is 1.
    losses: number of prompts l in which only the second arm is 1.
    count: number of prompts N. The three numbers may be fractions of effective numbers.
    level: coverage of the interval, in (0, 1).

  Returns:
    The lower and the upper end, in [-1, 1].
  """
  z = float(special.ndtri((1 + level) / 2))
  value = (gains - losses) / count

  def excess(d: float) -> float:
    """Return |g - l - N d| - z √(…), which is positive outside the interval."""
    a = 2 * count
    b = (2 * count - gains + losses) * d - gains - losses
    c = -losses * d * (1 - d)
    q = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    return abs(gains - losses - count * d) - z * math.sqrt(max(count * (2 * q + d * (1 - d)), 0.0))

  def find_end(inside: float, outside: float) -> float:
    for _ in range(60):  # halving: to 2^-60
      middle = (inside + outside) / 2
      inside, outside = (inside, middle) if excess(middle) > 0 else (middle, outside)
    return inside

  low = -1.0 if value == -1 else find_end(value, -1.0)
  return low, 1.0 if value == 1 else find_end(value, 1.0)


def paired_p_value(a: ArrayLike, b: ArrayLike, seed: int = 0) -> float:
  """Return the two-sided p-value of equal means, paired by prompt.

  Values 0 and 1: the exact test of McNemar (1947), a binomial test of the prompts that differ.
  Others: a randomization test that flips the signs of differences (Fisher 1935, section 21), with
  20,000 random flips; (1 + flips with at least this |mean|) / (1 + flips) (Phipson and Smyth 2010).

  Args:
    a: f64[N], one number per prompt.
    b: f64[N], numbers of the same prompts in the same order.
    seed: seed of the flips.

  Raises:
    ValueError: if there are no values, or not equally many.
  """
  first, second = _as_pair(a, b)
  if is_binary(first) and is_binary(second):
    gains, losses = int(np.sum(first > second)), int(np.sum(first < second))
    if gains == losses:
      return 1.0
    return min(1.0, 2 * float(special.bdtr(min(gains, losses), gains + losses, 0.5)))
  differences = first - second
  differences = differences[differences != 0]
  if not differences.size:
    return 1.0
  rng, done, extreme = np.random.default_rng(seed), 0, 0
  target = abs(differences.sum()) * (1 - 1e-9)  # equal sums that rounding parts count as equal
  while done < SIGN_FLIPS:
    rows = min(SIGN_FLIPS - done, max(_FLIP_BLOCK // differences.size, 1))
    signs = rng.integers(0, 2, (rows, differences.size), dtype=np.int8) * 2 - 1
    extreme += int(np.sum(np.abs(signs @ differences) >= target))
    done += rows
  return (1 + extreme) / (1 + SIGN_FLIPS)


def holm(p_values: Sequence[float]) -> list[float]:
  """Return p-values adjusted for a family of comparisons (Holm 1979).

  The k-th smallest of m becomes the maximum of (m - j + 1) p_j over j ≤ k, at most 1. Rejecting
  where this is at most α makes any false rejection in the family at most α likely.

  Args:
    p_values: the p-values of the family.

  Returns:
    The adjusted p-values, in the given order.
  """
  p = np.asarray(p_values, np.float64)
  order = np.argsort(p, kind='stable')
  adjusted = np.empty(p.size)
  adjusted[order] = np.minimum(np.maximum.accumulate((p.size - np.arange(p.size)) * p[order]), 1)
  return [float(value) for value in adjusted]


def is_binary(values: np.ndarray) -> bool:
  """Return whether all numbers are 0 or 1.

  Args:
    values: f64[N].
  """
  return bool(np.isin(values, (0, 1)).all())


def _t_half_width(values: np.ndarray, level: float) -> float:
  """Return half of the width of Student's t interval of the mean."""
  if values.size == 1:
    return 0.0
  error = values.std(ddof=1) / np.sqrt(values.size)
  return float(special.stdtrit(values.size - 1, (1 + level) / 2) * error)


def _as_numbers(values: ArrayLike) -> np.ndarray:
  numbers = np.asarray(values, np.float64)
  if not numbers.size:
    raise ValueError('An interval needs at least one value.')
  return numbers


def _as_pair(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
  first, second = _as_numbers(a), _as_numbers(b)
  if first.shape != second.shape:
    raise ValueError(f'Pairs need equally many values, but got {first.shape} and {second.shape}.')
  return first, second
