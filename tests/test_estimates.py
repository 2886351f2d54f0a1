"""Means over prompts and seeds, paired differences, and diversity."""

import numpy as np
import pytest

from cai_jax.evaluation.diversity import word_pair_diversity
from cai_jax.evaluation.estimates import estimate_difference, estimate_mean
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


def test_intervals_have_the_stated_coverage():
  rng = np.random.default_rng(0)
  covered = 0
  for trial in range(150):
    estimate = estimate_mean(draw_values(rng, 3, 60, 0.3), samples=300, seed=trial)
    covered += estimate.low <= 0.3 <= estimate.high
  assert covered / 150 >= 0.88  # a little wider than 95 % because seeds are resampled too


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
  assert estimate_difference(values, values) == (0, 0, 0)


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
