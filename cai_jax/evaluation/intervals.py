"""Bootstrap intervals of means."""

import numpy as np
from numpy.typing import ArrayLike


def bootstrap_interval(
  values: ArrayLike, seed: int = 0, samples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
  """Return a percentile bootstrap interval of the mean (Efron and Tibshirani 1993, chapter 13).

  Args:
    values: f64[N], one number per prompt. Prompts are resampled.
    seed: seed of the resampling.
    samples: number of resamples.
    level: coverage of the interval, in (0, 1).

  Returns:
    The lower and the upper end.

  Raises:
    ValueError: if there are no values.
  """
  numbers = np.asarray(values, np.float64)
  if not numbers.size:
    raise ValueError('An interval needs at least one value.')
  # scipy.stats.bootstrap draws the same resamples, but rounds the percentiles differently in the
  # last digit, and it rejects a single value.
  rng = np.random.default_rng(seed)
  means = [numbers[rng.integers(0, numbers.size, numbers.size)].mean() for _ in range(samples)]
  low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)
