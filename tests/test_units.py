"""Units: their segments stand together in one row, and their values in the columns of these."""

import numpy as np
import pytest

from cai_jax.data import packing
from cai_jax.data.examples import hold_out
from cai_jax.data.fingerprints import fingerprint
from cai_jax.data.units import Example, Unit, check_units, unit_lengths
from cai_jax.runtime.errors import UserError
from tests.preference_setup import random_units
from tests.training_setup import random_examples

UNITS = random_units(40)


def test_an_example_is_a_unit_of_one_segment():
  examples = random_examples(20)
  units = [Unit((example,), id=example.id) for example in examples]
  assert unit_lengths(units) == unit_lengths(examples) == [len(e.tokens) for e in examples]
  assert fingerprint(units) == fingerprint(examples)
  steps = packing.plan(unit_lengths(units), [packing.Bucket(32, 4)], 1, 0)
  for ours, theirs in zip(
    packing.Batches(units, steps), packing.Batches(examples, steps), strict=True
  ):
    assert list(ours) == list(theirs) == ['tokens', 'positions', 'segment_ids', 'loss_mask']
    for name in theirs:
      np.testing.assert_array_equal(ours[name], theirs[name])


def test_the_segments_of_a_unit_stand_together_with_their_values():
  units = [
    unit._replace(values={'number': (float(2 * i + 1), float(2 * i + 2))})
    for i, unit in enumerate(UNITS)
  ]
  steps = packing.plan(unit_lengths(units), [packing.Bucket(64, 3)], 1, 0)
  assert any(len(row) > 1 for step in steps for row in step.rows)
  for step, batch in zip(steps, packing.Batches(units, steps), strict=True):
    assert batch['number'].shape == (3, 64) and batch['number'].dtype == np.float32
    for r, row in enumerate(step.rows):
      parts = [(i, side) for i in row for side in (0, 1)]
      assert batch['segment_ids'][r].max() == len(parts)
      assert not batch['number'][r, len(parts) :].any()
      for segment, (i, side) in enumerate(parts, start=1):
        assert batch['number'][r, segment - 1] == 2 * i + side + 1
        (where,) = np.nonzero(batch['segment_ids'][r] == segment)
        example = units[i].segments[side]
        assert where[-1] - where[0] + 1 == len(example.tokens)
        np.testing.assert_array_equal(batch['tokens'][r, where], example.tokens)
        np.testing.assert_array_equal(batch['loss_mask'][r, where], example.loss_mask)
        np.testing.assert_array_equal(batch['positions'][r, where], np.arange(len(where)))


def test_units_of_another_kind_are_refused():
  check_units(UNITS, 'comparison', ['probability'])
  check_units(random_examples(2), 'sequence')
  first, second = UNITS[0].segments
  one = Unit((first,), {'probability': (1.0,)}, 'pair 0')
  unlearned = UNITS[0]._replace(segments=(first, second._replace(loss_mask=second.tokens < 0)))
  start = second._replace(tokens=second.tokens[:1], loss_mask=np.ones(1, bool))
  empty = second._replace(tokens=second.tokens[:0], loss_mask=second.loss_mask[:0])
  for units, kind, needed, match in (
    ([one], 'comparison', (), "pair 0 has 1 segments, .*'comparison', which have 2"),
    (UNITS, 'sequence', (), "'sequence', which have 1"),
    (UNITS, 'comparison', ('margin',), "pair 0 has no value 'margin'"),
    ([*UNITS, UNITS[0]._replace(values={})], 'comparison', (), 'All units need the same ones'),
    ([one._replace(values={'tokens': (1.0,)})], 'sequence', (), "array of a batch: .'tokens'"),
    ([one._replace(values={'margin': (1.0, 2.0)})], 'sequence', (), '2 numbers for 1 segments'),
    ([one._replace(values={'probability': (1.5,)})], 'sequence', (), r'1.5.*must be in \[0, 1\]'),
    ([one._replace(values={'probability': (np.nan,)})], 'sequence', (), r'nan.*in \[0, 1\]'),
    ([one._replace(values={'desirable': (-1.0,)})], 'sequence', (), r'-1.0.*must be in \[0, 1\]'),
    ([one._replace(values={'margin': (np.inf,)})], 'sequence', (), 'inf.*must be finite'),
    ([unlearned], 'comparison', (), 'pair 0: segment 1 of .* tokens has no token to learn'),
    (
      [UNITS[0]._replace(segments=(first, start))],
      'comparison',
      (),
      'segment 1 of 1 tokens has no',
    ),
    ([UNITS[0]._replace(segments=(empty, second))], 'comparison', (), 'segment 0 of 0 tokens has'),
  ):
    with pytest.raises(UserError, match=match):
      check_units(units, kind, needed)


def test_every_value_counts_in_the_fingerprint():
  before = fingerprint(UNITS)
  changed = UNITS[3]._replace(values={'probability': (0.123, 0.123)})
  one, two = UNITS[3].segments
  joined = Example(
    np.concatenate([one.tokens, two.tokens]), np.concatenate([one.loss_mask, two.loss_mask])
  )
  for other in (changed, UNITS[3]._replace(segments=(joined,)), UNITS[3]._replace(values={})):
    assert fingerprint([*UNITS[:3], other, *UNITS[4:]]) != before


def test_units_of_one_group_are_held_out_together():
  groups = {unit.id: i // 4 for i, unit in enumerate(UNITS)}
  training, held_out = hold_out(UNITS, 0.25, 0, groups, 'prefer')
  assert len(training) + len(held_out) == len(UNITS) and held_out
  assert not {groups[u.id] for u in training} & {groups[u.id] for u in held_out}
  with pytest.raises(UserError, match='prefer.eval_share=0.99'):
    hold_out(UNITS, 0.99, 0, None, 'prefer')
