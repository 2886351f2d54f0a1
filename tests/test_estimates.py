"""Means over prompts and seeds, paired differences, and diversity."""

import numpy as np
import pytest

from cai_jax.evaluation import intervals
from cai_jax.evaluation.diversity import word_pair_diversity
from cai_jax.evaluation.estimates import difference_p_value, estimate_difference, estimate_mean
from cai_jax.runtime.errors import UserError


def draw_values(rng, seeds, prompts, chance, name='{seed}-{i}'):
  return {
    seed: {name.format(seed=seed, i=i): float(rng.random() < chance) for i in range(prompts)}
    for seed in range(seeds)
  }


def test_mean_is_over_seeds_and_lies_in_its_interval():
  values = {0: {'a': 1.0, 'b': 0.0}, 1: {'c': 1.0, 'd': 1.0}}
  estimate = estimate_mean(values)
  assert estimate.value == 0.75
  assert estimate.low <= 0.75 <= estimate.high


def test_a_single_seed_has_the_intervals_of_single_values():
  values = {0: {f'p{i}': float(i < 2) for i in range(400)}}
  zero = {0: dict.fromkeys(values[0], 0.0)}
  assert estimate_mean(zero)[1:] == intervals.wilson_interval(0, 400)
  assert estimate_difference(values, zero)[1:] == intervals.tango_interval(2, 0, 400)
  assert difference_p_value(values, zero) == 0.5


def test_several_seeds_without_a_single_case_count_as_one_seed():
  """Whether the same prompts would fail with each seed is unknown, so they count once."""
  zeros = dict.fromkeys((f'p{i}' for i in range(400)), 0.0)
  assert estimate_mean({0: zeros, 1: zeros, 2: zeros})[1:] == pytest.approx(
    intervals.wilson_interval(0, 400)
  )
  own = {seed: {f'{seed}.{i}': 0.0 for i in range(400)} for seed in range(3)}
  assert estimate_mean(own)[1:] == pytest.approx(intervals.wilson_interval(0, 1200))
  low, high = estimate_difference(own, own)[1:]
  assert (low, high) == pytest.approx(intervals.tango_interval(0, 0, 1200))


def test_seeds_that_differ_widen_the_interval():
  rng = np.random.default_rng(4)
  alike, apart = (
    {s: {f'{s}.{i}': float(rng.random() < p) for i in range(200)} for s, p in enumerate(chances)}
    for chances in ((0.5, 0.5, 0.5), (0.3, 0.5, 0.7))
  )
  width = lambda e: e.high - e.low  # noqa: E731
  assert width(estimate_mean(apart)) > 2 * width(estimate_mean(alike))


def test_numbers_that_are_no_rates_have_students_t():
  rng = np.random.default_rng(5)
  values = {s: {f'{s}.{i}': rng.normal(30, 5) for i in range(100)} for s in range(3)}
  reference = {s: {k: v - 3 for k, v in row.items()} for s, row in values.items()}
  mean = estimate_mean(values)
  assert mean.high - mean.value == pytest.approx(mean.value - mean.low)
  assert 1.5 < mean.high - mean.low < 8
  assert estimate_difference(values, reference) == pytest.approx((3, 3, 3))
  assert difference_p_value(values, reference) < 1e-8


def test_the_p_value_is_where_the_interval_meets_zero():
  rng = np.random.default_rng(6)
  arm, reference = draw_values(rng, 3, 200, 0.55), draw_values(rng, 3, 200, 0.45)
  p = difference_p_value(arm, reference)
  assert 1e-9 < p < 0.5
  estimate = estimate_difference(arm, reference, level=1 - p)
  assert min(abs(estimate.low), abs(estimate.high)) < 1e-4


@pytest.mark.parametrize('shared', (False, True))
def test_intervals_have_the_stated_coverage(shared):
  rng = np.random.default_rng(0)
  covered = 0
  for _ in range(200):
    name = '{i}' if shared else '{seed}-{i}'
    estimate = estimate_mean(draw_values(rng, 3, 60, 0.3, name))
    covered += estimate.low <= 0.3 <= estimate.high
  assert 0.91 <= covered / 200


def draw_pairs(rng, shared, agreement, rates, spread):
  """Return the values of two arms with three seeds of 400 prompts.

  Args:
    rng: the random generator.
    shared: whether seeds have the same prompts.
    agreement: correlation of the responses of several seeds to one prompt.
    rates: the rates of the two arms.
    spread: standard deviation of the first arm's rate over seeds.
  """
  seeds, prompts = 3, 400
  prior = np.array([rates[1], 1 - rates[1]]) * (1 / agreement - 1) if agreement else None
  shape = (1 if shared else seeds, prompts)
  chance = rng.beta(*prior, shape) if agreement else np.full(shape, rates[1])
  ratio = (rates[0] + spread * rng.normal(size=(seeds, 1))) / rates[1]
  draws, own = rng.random((2, seeds, prompts))
  other = np.where(rng.random(own.shape) < 0.5, draws, own)  # half of the draws are in common
  return [
    {
      s: {f'{0 if shared else s}.{i}': float(v) for i, v in enumerate(row)}
      for s, row in enumerate(y)
    }
    for y in (other < chance * ratio, draws < chance)
  ]


@pytest.mark.slow
@pytest.mark.parametrize(
  ('shared', 'agreement', 'spread', 'least', 'most'),
  [  # spread: relative to the standard error of one seed's mean; bounds at rates 0.05 and 0.5
    (False, 0, 0, 0.94, 0.98),
    (True, 0, 0, 0.94, 0.98),
    (True, 0.5, 0, 0.94, 0.98),
    (False, 0, 1, 0.88, 0.96),
    (True, 0.5, 1, 0.87, 0.96),
  ],
)
@pytest.mark.parametrize('rate', (0.005, 0.05, 0.5))
def test_coverage_over_prompts_and_seeds(rate, shared, agreement, spread, least, most):
  """Check the coverage that the docstring of `estimates` states."""
  mean, difference = measure_coverage(rate, shared, agreement, spread, 500)
  assert least <= mean <= (1 if rate == 0.005 else most)
  assert least <= difference <= (1 if rate == 0.005 else most)


def measure_coverage(rate, shared, agreement, spread, trials):
  """Return the coverage of the intervals of an arm's mean and of a paired difference."""
  rng = np.random.default_rng(0)
  covered = np.zeros(2)
  for trial in range(trials):
    center = rate * (0.5 + 1.5 * trial / trials) if rate < 0.5 else rate
    sigma = spread * np.sqrt(center * (1 - center) / 400)
    arm, reference = draw_pairs(rng, shared, agreement, (0.8 * center, center), sigma)
    mean, difference = estimate_mean(arm), estimate_difference(arm, reference)
    covered += (
      mean.low <= 0.8 * center <= mean.high,
      difference.low <= -0.2 * center <= difference.high,
    )
  return covered / trials


def test_prompts_shared_by_all_seeds_are_resampled_together():
  """If only prompts vary, more seeds of the same prompts do not narrow the interval."""
  rng = np.random.default_rng(1)
  by_prompt = {f'p{i}': float(rng.random() < 0.5) for i in range(50)}
  single = estimate_mean({0: by_prompt})
  repeated = estimate_mean({seed: by_prompt for seed in range(8)})
  width = lambda e: e.high - e.low  # noqa: E731
  assert width(repeated) == pytest.approx(width(single), rel=0.15)


def test_paired_differences_cancel_shared_variation():
  rng = np.random.default_rng(2)
  reference = draw_values(rng, 2, 300, 0.5)
  changed = {s: {k: v * (rng.random() > 0.1) for k, v in f.items()} for s, f in reference.items()}
  paired, unpaired = estimate_difference(changed, reference), estimate_mean(reference)
  assert paired.high < 0
  assert paired.high - paired.low < 0.5 * (unpaired.high - unpaired.low)


def test_equal_arms_have_no_difference():
  values = draw_values(np.random.default_rng(3), 3, 20, 0.5)
  estimate = estimate_difference(values, values)
  assert estimate.value == 0 and estimate.low == pytest.approx(-estimate.high)
  assert 0.02 < estimate.high < 0.2  # 60 pairs without a difference do not prove that there is none
  assert difference_p_value(values, values) == 1


def test_arms_with_different_prompts_or_seeds_are_rejected():
  values = {0: {'a': 1.0, 'b': 0.0}}
  with pytest.raises(UserError, match=r"different prompts.*'b'"):
    estimate_difference({0: {'a': 1.0}}, values)
  with pytest.raises(UserError, match=r'seeds \[1\].*\[0\]'):
    estimate_difference({1: {'a': 1.0, 'b': 0.0}}, values)
  with pytest.raises(UserError, match='at least one seed'):
    estimate_mean({})
  with pytest.raises(UserError, match='at least one prompt'):
    estimate_mean({0: {}})


def test_diversity_is_0_for_equal_texts_and_1_without_a_shared_word_pair():
  assert word_pair_diversity(['a b c'] * 5) == [0.0] * 5
  assert word_pair_diversity([f'{i} a{i} b{i}' for i in range(6)]) == [1.0] * 6
  mixed = word_pair_diversity(['a b c', 'a b d', 'x y z', 'x y w'])
  assert all(0 < value < 1 for value in mixed)
  assert word_pair_diversity(['', '', 'a'])[2] == 1.0
  with pytest.raises(UserError, match='there are 1'):
    word_pair_diversity(['a'])


def test_diversity_uses_the_same_partners_in_every_arm():
  texts = [f'word{i} is here' for i in range(10)]
  changed = [*texts[:9], 'something else entirely now']
  before, after = (word_pair_diversity(arm, partners=1) for arm in (texts, changed))
  same = [a == b for a, b in zip(before, after, strict=True)]
  assert sum(same) >= 6 and not same[9]
