"""Agreement between raters beyond chance: Cohen's κ and Krippendorff's α, for nominal labels.

Labels are integers from 0; -1 means that a rater did not rate a pair. Intervals are 95 % percentile
bootstrap intervals over pairs. Resamples in which all labels are the same have no κ or α and are
left out.
"""

from typing import Any

import numpy as np

LABELS = ('first', 'tie', 'second')  # which of two responses is better
SAMPLES = 2000  # of the bootstrap


def cohen_kappa(first: np.ndarray, second: np.ndarray, seed: int = 0) -> dict[str, Any]:
  """Return κ = (p_o - p_e) / (1 - p_e) of two raters (Cohen 1960).

  p_o is the share of pairs with equal labels, and p_e the share that two raters with the same
  shares of labels would reach by chance.

  Args:
    first: i64[N], labels of the first rater.
    second: i64[N], labels of the second rater. Pairs that one of both did not rate are left out.
    seed: seed of the bootstrap.

  Returns:
    A dict with `pairs` (number of pairs that both rated), `value` (None if it is not defined) and
    `interval` (None likewise).
  """
  first, second = np.asarray(first, int), np.asarray(second, int)
  rated = (first >= 0) & (second >= 0)
  size = max(first.max(initial=0), second.max(initial=0)) + 1
  cells = np.eye(size * size)[first[rated] * size + second[rated]]  # f64[N,K²], one-hot

  def kappas(tables: np.ndarray) -> np.ndarray:
    shares = tables.reshape(-1, size, size) / tables.sum(axis=1)[:, None, None]
    observed = np.einsum('sii->s', shares)
    expected = np.einsum('si,si->s', shares.sum(axis=2), shares.sum(axis=1))
    return _divide(observed - expected, 1 - expected)

  return {'pairs': int(rated.sum())} | _bootstrap(kappas, cells, seed)


def krippendorff_alpha(labels: np.ndarray, seed: int = 0) -> dict[str, Any]:
  """Return α = 1 - D_o / D_e of any number of raters (Krippendorff 2011, nominal data).

  A pair with m ratings adds 1 / (m - 1) to the table of coincidences for each two of its ratings by
  different raters. D_o is the share of coincidences that differ, and D_e the share that labels
  would reach that were dealt to the pairs by chance.

  Args:
    labels: i64[N,R], labels by pair and rater. Pairs with fewer than two ratings are left out.
    seed: seed of the bootstrap.

  Returns:
    See `cohen_kappa`; `pairs` counts those with at least two ratings.
  """
  labels = np.asarray(labels, int)
  size = labels.max(initial=0) + 1
  counts = (labels[:, :, None] == np.arange(size)).sum(axis=1).astype(float)  # f64[N,K]
  counts = counts[counts.sum(axis=1) >= 2]
  ratings = counts.sum(axis=1)
  different = counts[:, :, None] * counts[:, None, :] * (1 - np.eye(size))
  disagreement = different.sum(axis=(1, 2)) / (ratings - 1)  # f64[N], coincidences that differ
  cells = np.column_stack([disagreement, counts])

  def alphas(tables: np.ndarray) -> np.ndarray:
    totals = tables[:, 1:]
    total = totals.sum(axis=1)
    expected = total**2 - (totals**2).sum(axis=1)
    return 1 - _divide(tables[:, 0] * (total - 1), expected)

  return {'pairs': len(counts)} | _bootstrap(alphas, cells, seed)


def _divide(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
  """Return the quotients, NaN where the denominator is 0."""
  defined = denominators > 1e-12
  return np.where(defined, numerators / np.where(defined, denominators, 1), np.nan)


def _bootstrap(statistic: Any, cells: np.ndarray, seed: int) -> dict[str, Any]:
  """Return a statistic of sums over pairs, with its interval.

  Args:
    statistic: function from f64[S,C], sums of `cells` over the pairs of each sample, to f64[S].
    cells: f64[N,C].
    seed: seed of the resampling.
  """
  count = len(cells)
  if not count:
    return {'value': None, 'interval': None}
  value = float(statistic(cells.sum(axis=0)[None])[0])
  if np.isnan(value):
    return {'value': None, 'interval': None}
  rng = np.random.default_rng(seed)
  draws = rng.multinomial(count, np.full(count, 1 / count), SAMPLES)
  resampled = statistic(draws @ cells)
  resampled = resampled[~np.isnan(resampled)]
  low, high = np.quantile(resampled, [0.025, 0.975]) if resampled.size else (value, value)
  return {'value': value, 'interval': [float(low), float(high)]}
