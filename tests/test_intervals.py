"""Intervals of rates and paired differences, p-values, and Holm's correction."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from cai_jax.evaluation import intervals

COUNT = 400  # prompts of the simulations
RATES = (0.005, 0.05, 0.5)
# Coverage of paired intervals at 0.005, by ratio of the rates and correlation of the arms.
# Above 97 %, arms differ in so few prompts that no method can do better (see `intervals`).
RARE_COVERAGE = {
  (1.0, 0.0): 0.961,
  (1.0, 0.3): 0.969,
  (1.0, 0.7): 0.993,
  (0.7, 0.0): 0.970,
  (0.7, 0.3): 0.978,
  (0.7, 0.7): 0.995,
}


def nearby_rates(rate):
  """Return rates around one; discrete data is averaged over them (Newcombe 1998)."""
  return np.linspace(rate / 2, min(2 * rate, 1 - rate / 2), 21)


def test_wilson_equals_scipy_and_no_rate_is_a_point():
  for successes, count in ((0, 400), (3, 400), (200, 400), (7, 8), (1, 1)):
    expected = stats.binomtest(successes, count).proportion_ci(0.95, 'wilson')
    assert intervals.wilson_interval(successes, count) == pytest.approx(tuple(expected), abs=1e-12)
  low, high = intervals.rate_interval([0] * COUNT)
  assert low == 0 and 0.009 < high < 0.01
  low, high = intervals.rate_interval([1] * COUNT)
  assert high == 1 and 0.99 < low < 0.991
  low, high = intervals.rate_interval([0.5] * 20)
  assert low < 0.45 and high > 0.55
  with pytest.raises(ValueError, match='at least one'):
    intervals.rate_interval([])
  with pytest.raises(ValueError, match='in \\[0, 1\\]'):
    intervals.rate_interval([0, 2])


def test_ties_narrow_the_interval_of_a_rate():
  binary, ties = np.tile([0.0, 1.0], 100), np.tile([0.25, 0.75], 100)
  width = lambda v: np.ptp(intervals.rate_interval(v))  # noqa: E731
  assert width(ties) == pytest.approx(width(binary) / 2, rel=0.02)


def test_mean_interval_is_students_t():
  values = np.random.default_rng(0).normal(3, 2, 30)
  expected = stats.t.interval(0.95, 29, values.mean(), stats.sem(values))
  assert intervals.mean_interval(values) == pytest.approx(expected)
  assert intervals.mean_interval([0, 1, 1]) == intervals.rate_interval([0, 1, 1])
  assert intervals.mean_interval([2.5] * 4) == (2.5, 2.5)


def test_ends_of_tango_solve_the_score_equation():
  """The nuisance parameter is maximized numerically here, and in closed form there."""
  for gains, losses, count in ((9, 0, 30), (0, 0, 50), (12, 5, 80), (50, 0, 50)):
    low, high = intervals.tango_interval(gains, losses, count)
    for end in (low, high):
      if abs(end) < 1:
        assert _likelihood_score(end, gains, losses, count) == pytest.approx(1.959964, abs=1e-4)
    assert low <= (gains - losses) / count <= high
  assert intervals.tango_interval(0, 0, 50) == pytest.approx((-0.0713, 0.0713), abs=1e-4)


def _likelihood_score(d, gains, losses, count):
  """Return |score| at a difference d, with the likelihood maximized on a grid."""
  q = np.linspace(max(0, -d), (1 - d) / 2, 2_000_001)[:-1]
  with np.errstate(divide='ignore'):
    likelihood = (
      special.xlogy(gains, q + d)
      + special.xlogy(losses, q)
      + special.xlogy(count - gains - losses, 1 - 2 * q - d)
    )
  best = q[np.nanargmax(likelihood)]
  return abs(gains - losses - count * d) / np.sqrt(count * (2 * best + d * (1 - d)))


def test_paired_differences_need_no_order_and_mirror():
  a, b = np.array([1, 1, 0, 0, 1.0, 0]), np.array([0, 1, 0, 0, 1.0, 0])
  estimate = intervals.paired_difference(a, b)
  mirrored = intervals.paired_difference(b, a)
  assert estimate.value == pytest.approx(1 / 6)
  assert (mirrored.low, mirrored.high) == pytest.approx((-estimate.high, -estimate.low))
  lengths = intervals.paired_difference([3.0, 5, 9], [1.0, 4, 9])
  assert lengths.value == 1 and lengths.low < 0 < lengths.high
  with pytest.raises(ValueError, match='equally many'):
    intervals.paired_difference([1, 0], [1])


def test_p_values_are_exact_for_binary_and_uniform_for_other_values():
  a, b = np.repeat([1, 0, 0], [9, 2, 30]), np.repeat([0, 1, 0], [9, 2, 30])
  assert intervals.paired_p_value(a, b) == pytest.approx(stats.binomtest(2, 11).pvalue)
  assert intervals.paired_p_value(a, a) == 1
  rng = np.random.default_rng(1)
  pairs = rng.normal(size=(2, 60))
  expected = stats.ttest_rel(*pairs).pvalue  # close to the randomization test for normal data
  assert intervals.paired_p_value(*pairs) == pytest.approx(expected, abs=0.02)
  assert intervals.paired_p_value(pairs[0] + 3, pairs[0]) == 1 / 20001
  assert intervals.paired_p_value([0.5], [0.5]) == 1


def test_holm_equals_the_definition():
  assert intervals.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
  assert intervals.holm([]) == []
  assert intervals.holm([0.9, 0.8]) == [1, 1]


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_lowers_no_p_value_and_keeps_their_order(p_values):
  adjusted = intervals.holm(p_values)
  assert all(1 >= q >= p for p, q in zip(p_values, adjusted, strict=True))
  assert np.all(np.diff(np.array(adjusted)[np.argsort(p_values, kind='stable')]) >= 0)


@pytest.mark.slow
@pytest.mark.parametrize('rate', RATES)
def test_wilson_intervals_cover_at_93_to_97_percent(rate):
  """The coverage is exact: a sum over the binomial distribution, averaged over nearby rates."""
  ends = np.array([intervals.wilson_interval(x, COUNT) for x in range(COUNT + 1)])
  coverage = []
  for true in nearby_rates(rate):
    chances = stats.binom.pmf(np.arange(COUNT + 1), COUNT, true)
    coverage.append(chances[(ends[:, 0] <= true) & (true <= ends[:, 1])].sum())
  assert 0.93 <= np.mean(coverage) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize('correlation', (0.0, 0.3, 0.7))
@pytest.mark.parametrize('ratio', (1.0, 0.7))
@pytest.mark.parametrize('rate', RATES)
def test_paired_intervals_cover_at_93_to_97_percent(rate, ratio, correlation):
  """Two arms, the second with `ratio` times the rate of the first, and correlated by prompt."""
  rng = np.random.default_rng(0)
  covered = []
  for first in nearby_rates(rate):
    second = ratio * first
    spread = np.sqrt(first * (1 - first) * second * (1 - second))
    both = min(first * second + correlation * spread, second)
    cells = [first - both, second - both, 1 - first - second + 2 * both]
    tables, repeats = np.unique(rng.multinomial(COUNT, cells, 2000), axis=0, return_counts=True)
    for (gains, losses, _), repeat in zip(tables, repeats, strict=True):
      low, high = intervals.tango_interval(gains, losses, COUNT)
      covered.append((repeat, low - 1e-9 <= first - second <= high + 1e-9))
  weights, hits = np.array(covered).T
  coverage = np.average(hits, weights=weights)
  assert coverage >= 0.93
  if rate == 0.005:
    assert coverage == pytest.approx(RARE_COVERAGE[ratio, correlation], abs=0.005)
  else:
    assert coverage <= 0.97
