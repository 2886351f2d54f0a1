"""Bootstrap intervals of means."""

from collections.abc import Sequence

import numpy as np

from cai_jax.runtime.errors import UserError


def bootstrap_interval(
  values: Sequence[float], seed: int = 0, samples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
  """Percentile bootstrap interval of the mean (Efron and Tibshirani 1993, chapter 13).

  Args:
    values: one number a prompt; the prompts are what is resampled.
    seed: of the resampling.
    samples: number of resamples.
    level: coverage.

  Raises:
    ValueError: if there is no value.
  """
  values = np.asarray(values, np.float64)
  if not values.size:
    raise UserError('an interval needs at least one value.')
  rng = np.random.default_rng(seed)
  means = [values[rng.integers(0, values.size, values.size)].mean() for _ in range(samples)]
  low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)
