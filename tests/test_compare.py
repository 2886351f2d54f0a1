"""Means over prompts and seeds, paired differences, diversity."""

import numpy as np
import pytest

from cai_jax.evaluation.compare import diversity, mean, paired_difference


def drawn(rng, seeds, prompts, chance, name='{seed}-{i}'):
  return {
    seed: {name.format(seed=seed, i=i): float(rng.random() < chance) for i in range(prompts)}
    for seed in range(seeds)
  }


def test_mean_is_over_seeds_and_prompts_and_lies_in_its_interval():
  values = {0: {'a': 1.0, 'b': 0.0}, 1: {'c': 1.0, 'd': 1.0}}
  estimate = mean(values)
  assert estimate.value == 0.75
  assert estimate.low <= 0.75 <= estimate.high


def test_the_interval_covers_the_truth_as_often_as_it_says():
  rng = np.random.default_rng(0)
  covered = 0
  for trial in range(150):
    found = mean(drawn(rng, 3, 60, 0.3), samples=300, seed=trial)
    covered += found.low <= 0.3 <= found.high
  assert covered / 150 >= 0.88  # three seeds resampled make it a little wider than prompts alone


def test_the_same_prompts_in_all_seeds_are_resampled_together():
  """Where prompts differ and seeds do not, more seeds of the same prompts tell nothing new."""
  rng = np.random.default_rng(1)
  of_prompt = {f'p{i}': float(rng.random() < 0.5) for i in range(50)}
  once, often = mean({0: of_prompt}), mean({seed: of_prompt for seed in range(8)})
  width = lambda e: e.high - e.low  # noqa: E731
  assert width(often) == pytest.approx(width(once), rel=0.15)


def test_pairs_cancel_what_arms_have_in_common():
  rng = np.random.default_rng(2)
  reference = drawn(rng, 2, 300, 0.5)
  better = {s: {k: v * (rng.random() > 0.1) for k, v in f.items()} for s, f in reference.items()}
  paired = paired_difference(better, reference)
  assert paired.high < 0
  assert paired.high - paired.low < 0.5 * (mean(reference).high - mean(reference).low)


def test_equal_arms_differ_by_nothing():
  values = drawn(np.random.default_rng(3), 3, 20, 0.5)
  assert paired_difference(values, values) == (0, 0, 0)


def test_arms_over_other_prompts_or_seeds_are_refused():
  values = {0: {'a': 1.0, 'b': 0.0}}
  with pytest.raises(ValueError, match=r"different prompts.*'b'"):
    paired_difference({0: {'a': 1.0}}, values)
  with pytest.raises(ValueError, match=r'seeds \[1\].*\[0\]'):
    paired_difference({1: {'a': 1.0, 'b': 0.0}}, values)
  with pytest.raises(ValueError, match='at least one seed'):
    mean({})
  with pytest.raises(ValueError, match='at least one prompt'):
    mean({0: {}})


def test_diversity_is_nothing_for_equal_texts_and_all_for_texts_without_a_common_pair():
  assert diversity(['a b c'] * 5) == [0.0] * 5
  assert diversity([f'{i} a{i} b{i}' for i in range(6)]) == [1.0] * 6
  mixed = diversity(['a b c', 'a b d', 'x y z', 'x y w'])
  assert all(0 < value < 1 for value in mixed)
  assert diversity(['', '', 'a'])[2] == 1.0
  with pytest.raises(ValueError, match='there are 1'):
    diversity(['a'])


def test_diversity_compares_the_same_partners_in_every_arm():
  texts = [f'word{i} is here' for i in range(10)]
  changed = [*texts[:9], 'something else entirely now']
  before, after = (diversity(given, partners=1) for given in (texts, changed))
  same = [a == b for a, b in zip(before, after, strict=True)]
  assert sum(same) >= 6 and not same[9]
