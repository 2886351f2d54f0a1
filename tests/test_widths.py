"""Widths of paired intervals in two workdirs of an experiment."""

import pytest

from experiments import widths


def results(low, high):
  number = {'value': (low + high) / 2, 'interval': [low, high]}
  return {
    'arms': {
      'reference': {'groups': {'harmful': {'metrics': {}}}},
      'other': {'groups': {'harmful': {'metrics': {}, 'differences': {'violation_rate': number}}}},
    }
  }


def test_width_of_each_paired_interval_before_and_after():
  before, after = results(-0.10, -0.02), results(-0.08, -0.06)
  [(group, arm, metric, old, new)] = widths.width_rows(before, after)
  assert (group, arm, metric) == ('harmful', 'other', 'violation_rate')
  assert (old, new) == pytest.approx((0.08, 0.02))
  text = widths.describe(before, after)
  assert '8.0 →  2.0   0.25' in text and 'after / before 0.25 over 1 arms' in text
