"""Test agreement between raters against published worked examples."""

import numpy as np
import pytest

from cai_jax.evaluation.agreement import cohen_kappa, krippendorff_alpha

# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C: nominal data, four
# observers, 12 units, with missing data. 0 is missing here.
KRIPPENDORFF = [
  [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
  [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
  [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
  [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
]


def test_kappa_is_that_of_cohens_example():
  # Cohen 1960, table 1: 200 cases, p_o = .70, p_e = .41, κ = .492.
  table = np.array([[88, 10, 2], [14, 40, 6], [18, 10, 12]])
  first, second = (np.repeat(index.ravel(), table.ravel()) for index in np.indices(table.shape))
  result = cohen_kappa(first, second)
  assert result['pairs'] == 200
  assert result['value'] == pytest.approx(0.29 / 0.59, abs=1e-12)
  low, high = result['interval']
  assert 0.35 < low < 0.41 < 0.57 < high < 0.63  # Fleiss et al. 1969: standard error about 0.05


def test_alpha_is_that_of_krippendorffs_example():
  labels = np.array(KRIPPENDORFF).T - 1
  result = krippendorff_alpha(labels)
  assert result['pairs'] == 11  # the last unit has one value
  assert round(result['value'], 3) == 0.743
  low, high = result['interval']
  assert low < 0.743 < high <= 1


def test_pairs_without_two_ratings_do_not_count():
  first, second = np.array([0, 1, -1, 2]), np.array([0, 2, 1, -1])
  assert cohen_kappa(first, second)['pairs'] == 2
  assert cohen_kappa(first, second) == cohen_kappa(first[:2], second[:2])
  assert krippendorff_alpha(np.array([[0, -1], [-1, -1]]))['value'] is None


@pytest.mark.parametrize('labels', ([0, 0, 0], [2, 2, 2]))
def test_equal_labels_have_no_agreement_beyond_chance(labels):
  both = np.array(labels)
  assert cohen_kappa(both, both)['value'] is None
  assert krippendorff_alpha(np.stack([both, both], axis=1))['value'] is None


def test_perfect_and_opposite_ratings_are_the_ends():
  first = np.array([0, 2] * 20)
  assert cohen_kappa(first, first) == {'pairs': 40, 'value': 1.0, 'interval': [1.0, 1.0]}
  assert cohen_kappa(first, 2 - first)['value'] == -1
  assert krippendorff_alpha(np.stack([first, first, first], axis=1))['value'] == 1
