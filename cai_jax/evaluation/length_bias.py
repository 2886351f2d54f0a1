"""How much a judge's verdicts follow the lengths of the responses.

Lengths are in characters, which every language has. The difference of a match is that of its first
response minus that of its second.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cai_jax.evaluation.intervals import rate_interval

FEWEST_PAIRS = 10  # of a regression
UNIT = 100  # characters: a slope is in nats per 100 characters
# From this share of the variance of the log-odds on, a judge is said to prefer a length.
LARGE_SHARE = 0.25


def length_differences(responses: Sequence[tuple[str, str]]) -> np.ndarray:
  """Return f64[N], the characters of each first response minus those of the second."""
  return np.array([len(a.strip()) - len(b.strip()) for a, b in responses], np.float64)


def length_bias(
  differences: ArrayLike, log_odds: ArrayLike, level: float = 0.95
) -> dict[str, Any] | None:
  """Return the regression of a judge's log-odds on the difference in length.

  The line is fitted by least squares. Its intercept is what the judge says at equal lengths. On
  labelled pairs, where the first response is always the better one, the slope is thus the effect of
  length beyond that of the label. The interval allows for unequal variances (HC3 of MacKinnon and
  White 1985).

  Args:
    differences: f64[N], lengths of the first minus the second response, in characters.
    log_odds: f64[N], the judge's mean log-odds for the first response, in nats.
    level: coverage of the interval, in (0, 1).

  Returns:
    A dict with

    - `slope`: nats per 100 characters that the first response is longer;
    - `slope_interval`: its interval [low, high];
    - `share`: the share of the variance of the log-odds that lengths explain;
    - `pairs`: their number.

    None if there are fewer than `FEWEST_PAIRS`, or all differences are equal.
  """
  x, y = np.asarray(differences, np.float64) / UNIT, np.asarray(log_odds, np.float64)
  if x.size < FEWEST_PAIRS or not np.ptp(x):
    return None
  centred = x - x.mean()
  spread = float((centred**2).sum())
  slope = float(centred @ y) / spread
  residuals = y - y.mean() - slope * centred
  leverage = 1 / x.size + centred**2 / spread
  # A pair with leverage 1 has residual 0: the line passes through it.
  scaled = residuals / np.maximum(1 - leverage, 1e-12)
  error = math.sqrt(float((centred**2 * scaled**2).sum())) / spread
  width = statistics.NormalDist().inv_cdf(0.5 + level / 2) * error
  variance = float(((y - y.mean()) ** 2).sum())
  return {
    'slope': slope,
    'slope_interval': [slope - width, slope + width],
    'share': slope**2 * spread / variance if variance else 0.0,
    'pairs': int(x.size),
  }


def describe_length_bias(bias: dict[str, Any] | None) -> str:
  """Return 'prefers length' or 'prefers brevity' with figures if the bias is large, else ''.

  It is large if the interval of the slope excludes 0 and lengths explain at least a quarter of the
  variance of the log-odds.

  Args:
    bias: a result of `length_bias`.
  """
  if bias is None:
    return ''
  low, high = bias['slope_interval']
  if low <= 0 <= high or bias['share'] < LARGE_SHARE:
    return ''
  name = 'length' if bias['slope'] > 0 else 'brevity'
  return (
    f'prefers {name}: {bias["slope"]:+.2f} nats per {UNIT} characters '
    f'[{low:+.2f}, {high:+.2f}], {100 * bias["share"]:.0f} % of the variance of its verdicts'
  )


def length_controlled_rate(
  differences: ArrayLike,
  points: ArrayLike,
  *,
  samples: int = 1000,
  level: float = 0.95,
  seed: int = 0,
) -> dict[str, Any]:
  """Return the win rate that the first player would have at equal lengths.

  As in AlpacaEval 2 (Dubois et al. 2024, section 3), a logistic regression explains the points by a
  term for the players and one for tanh(d / s), where d is the difference in length and s its
  standard deviation. The rate is the prediction at d = 0. There is no term for the difficulty of a
  prompt, which they estimate from many models. Half a virtual draw, shared by the two ends +1 and
  -1 of the tanh, keeps the fit finite if the points follow the lengths or are all the same.

  Args:
    differences: f64[N], lengths of the first minus the second response, in characters; one pair per
      prompt.
    points: f64[N], 1 for a win of the first player, 0.5 for a tie, 0 for a loss.
    samples: number of resamples of the prompts.
    level: coverage of the interval, in (0, 1).
    seed: seed of the resampling.

  Returns:
    A dict with `rate` and its percentile bootstrap `interval` [low, high]. If all points are equal,
    resamples do not vary, and the interval is that of `intervals.rate_interval`.

  Raises:
    ValueError: if there are no pairs.
  """
  d, y = np.asarray(differences, np.float64), np.asarray(points, np.float64)
  if not d.size:
    raise ValueError('A win rate needs at least one pair.')
  spread = d.std() if np.ptp(d) else 1.0
  x = np.tanh(d / spread)
  draws = np.random.default_rng(seed).multinomial(d.size, np.full(d.size, 1 / d.size), samples)
  weights = np.concatenate([np.ones((1, d.size)), draws])
  virtual = np.full((len(weights), 2), 0.25)
  intercepts = _fit_intercepts(
    np.append(x, [1.0, -1.0]), np.append(y, [0.5, 0.5]), np.concatenate([weights, virtual], axis=1)
  )
  rates = 0.5 + 0.5 * np.tanh(intercepts / 2)
  low, high = np.quantile(rates[1:], [(1 - level) / 2, (1 + level) / 2])
  if not np.ptp(y):
    low, high = rate_interval(y, level)
  return {'rate': float(rates[0]), 'interval': [float(low), float(high)]}


def _fit_intercepts(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """Return f64[S], the intercepts of S logistic regressions on one feature, by Newton's method.

  Args:
    x: f64[N], the feature.
    y: f64[N], targets in [0, 1].
    weights: f64[S,N], the weights of the observations in each regression.
  """
  theta = np.zeros((len(weights), 2))
  for _ in range(200):
    chance = 0.5 + 0.5 * np.tanh((theta[:, :1] + theta[:, 1:] * x) / 2)
    residual, curvature = weights * (y - chance), weights * chance * (1 - chance)
    gradient = np.stack([residual.sum(axis=1), residual @ x], axis=1)
    a, b, c = curvature.sum(axis=1), curvature @ x, curvature @ x**2
    hessian = np.stack([a, b, b, c], axis=1).reshape(-1, 2, 2)
    step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
    # Steps of at most 1 nat prevent overshooting.
    theta += step / np.maximum(np.abs(step).max(axis=1, keepdims=True), 1)
    if np.abs(step).max() < 1e-9:
      return theta[:, 0]
  raise RuntimeError(f'The regression did not converge: the last step was {step.max():.3g} nats.')
