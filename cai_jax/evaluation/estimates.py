"""Estimates over prompts and seeds: means and paired differences, with bootstrap intervals.

The arms of an experiment answer the same prompts with the same random numbers. Differences are
therefore taken prompt by prompt, which cancels the variation that two arms share.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from cai_jax.evaluation.intervals import Estimate
from cai_jax.runtime.errors import UserError

Values = Mapping[int, Mapping[str, float]]  # by seed and prompt id, one number per response


def estimate_mean(
  values: Values, samples: int = 2000, level: float = 0.95, seed: int = 0
) -> Estimate:
  """Estimate the mean over prompts and seeds.

  The bootstrap has two levels: it resamples seeds and, within each seed, prompts. If all seeds have
  the same prompts, one resample of the prompts is used for all of them. With a single seed, the
  interval covers the variation between prompts only.

  The bootstrap is biased for few seeds. With n seeds it includes (n - 1) / n of the variance
  between seeds and up to (2 n - 1) / n of the variance between prompts. With three seeds, for
  example, an interval has 1.3 times its proper width if seeds hardly differ, and 0.8 times if
  seeds differ much more than prompts.

  Args:
    values: one number per seed and prompt.
    samples: number of resamples.
    level: coverage of the interval, in (0, 1).
    seed: seed of the resampling.

  Raises:
    UserError: if there is no seed, or a seed has no prompt.
  """
  if not values or not all(values.values()):
    raise UserError('An estimate needs at least one seed, and at least one prompt in each seed.')
  rng = np.random.default_rng(seed)
  first = list(next(iter(values.values())))
  shared = len(values) > 1 and all(set(row) == set(first) for row in values.values())
  prompts = {s: first if shared else list(row) for s, row in values.items()}
  rows = [np.array([values[s][prompt] for prompt in prompts[s]], np.float64) for s in values]
  # scipy.stats.bootstrap resamples one level only, so it cannot replace this.
  means = [_resample_mean(rows, shared, rng) for _ in range(samples)]
  low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
  return Estimate(float(np.mean([row.mean() for row in rows])), float(low), float(high))


def estimate_difference(arm: Values, reference: Values, **options) -> Estimate:
  """Estimate the mean of arm - reference, paired by seed and prompt.

  Args:
    arm: one number per seed and prompt.
    reference: numbers for the same seeds and prompts.
    **options: keyword arguments for `estimate_mean`.

  Raises:
    UserError: if the two have different seeds, or different prompts for a seed.
  """
  if set(arm) != set(reference):
    raise UserError(
      f'One arm has the seeds {sorted(arm)} and the other {sorted(reference)}. Differences are '
      'paired, so run both with the same seeds.'
    )
  for seed, values in arm.items():
    unpaired = sorted(set(values) ^ set(reference[seed]))
    if unpaired:
      raise UserError(
        f'The arms answer different prompts: with seed {seed}, {len(unpaired)} of {len(values)} '
        f'and {len(reference[seed])} prompts are unpaired, the first is {unpaired[0]!r}. '
        'Differences are paired, so use the same prompts for both.'
      )
  differences = {
    seed: {prompt: value - reference[seed][prompt] for prompt, value in values.items()}
    for seed, values in arm.items()
  }
  return estimate_mean(differences, **options)


def _resample_mean(rows: Sequence[np.ndarray], shared: bool, rng: np.random.Generator) -> float:
  """Return the mean of one resample of seeds and prompts.

  Args:
    rows: for each seed, the numbers of its prompts.
    shared: whether one resample of the prompts is used for all seeds.
    rng: the random generator.
  """
  seeds = rng.integers(0, len(rows), len(rows))
  if shared:
    prompts = rng.integers(0, rows[0].size, rows[0].size)
    return float(np.mean([rows[i][prompts].mean() for i in seeds]))
  return float(
    np.mean([rows[i][rng.integers(0, rows[i].size, rows[i].size)].mean() for i in seeds])
  )
