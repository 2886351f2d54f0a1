"""A table of examples or units is the sequence that it was made from, for whoever trains on it."""

import numpy as np
import pytest

from cai_jax.data import packing
from cai_jax.data.examples import hold_out
from cai_jax.data.fingerprints import fingerprint
from cai_jax.data.ragged import Ragged
from cai_jax.data.unit_table import UnitTable, make_part, map_part, save_part, stack_units
from cai_jax.data.units import (
  add_values,
  check_units,
  item_ids,
  segment_lengths,
  share_prompts,
  shared_counts,
  unit_lengths,
)
from cai_jax.runtime.errors import UserError
from cai_jax.training import workload
from tests.preference_setup import PREFER, random_units
from tests.training_setup import CONFIG, MODEL, one_device, random_examples

UNITS = random_units(40, margin=0.5)
EXAMPLES = [e._replace(id=f'row {i // 2} ä') for i, e in enumerate(random_examples(30))]


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch):
  """Measuring the speed of the CPU takes a second, and no test here reads it."""
  monkeypatch.setattr(workload.hardware, 'peak_flops', lambda devices, dtype: None)


def mapped(folder, items, kind, sizes):
  """Return a table of files that hold `sizes` items each."""
  parts, begin = [], 0
  for number, size in enumerate(sizes):
    path = folder / f'{number}.safetensors'
    save_part(path, make_part(items[begin : begin + size], {'odd': [True] * size}, {'empty': 1}))
    parts.append(map_part(path))
    begin += size
  assert begin == len(items) and all(part.counts == {'empty': 1} for part in parts)
  return UnitTable(parts, kind)


def assert_same(table, items, config):
  assert len(table) == len(items)
  for one, other in zip(table, items, strict=True):
    assert type(one) is type(other) and one.id == other.id
    for a, b in zip(*(getattr(x, 'segments', (x,)) for x in (one, other)), strict=True):
      np.testing.assert_array_equal(a.tokens, b.tokens)
      np.testing.assert_array_equal(a.loss_mask, b.loss_mask)
    assert getattr(one, 'values', None) == getattr(other, 'values', None)
    assert getattr(one, 'shared', 0) == getattr(other, 'shared', 0)
  assert item_ids(table) == item_ids(items)
  assert list(unit_lengths(table)) == unit_lengths(items)
  assert list(shared_counts(table)) == list(shared_counts(items))
  for a, b in zip(segment_lengths(table), segment_lengths(items), strict=True):
    np.testing.assert_array_equal(a, b)
  assert fingerprint(table) == fingerprint(items)
  steps = packing.plan(unit_lengths(table), [packing.Bucket(64, 3)], 1, 0)
  assert packing.padding_share(table, steps) == packing.padding_share(items, steps)
  batches, expected = packing.Batches(table, steps), packing.Batches(items, steps)
  for i in range(len(steps)):
    assert batches[i].keys() == expected[i].keys()
    for name in batches[i]:
      np.testing.assert_array_equal(batches[i][name], expected[i][name])
    assert batches.example_ids(i) == expected.example_ids(i)
  a, b = (workload.measure_workload(MODEL, x, steps, config, one_device()) for x in (table, items))
  np.testing.assert_array_equal(a.tokens, b.tokens)
  np.testing.assert_array_equal(a.flops, b.flops)


def test_a_mapped_table_of_examples_is_their_sequence(tmp_path):
  table = mapped(tmp_path, EXAMPLES, 'sequence', (7, 0, 23))
  assert_same(table, EXAMPLES, CONFIG)
  order = np.array([29, 3, 8, 8, 0, 7])
  assert_same(table.take(order), [EXAMPLES[i] for i in order], CONFIG)
  for own, others in zip(hold_out(table, 0.2, 0), hold_out(EXAMPLES, 0.2, 0), strict=True):
    assert_same(own, others, CONFIG)


def test_a_table_of_units_keeps_values_and_shared_prompts(tmp_path):
  table = stack_units(UNITS, 'comparison')
  assert_same(table, UNITS, PREFER)
  taken, order = [UNITS[i] for i in (5, 39, 2)], np.array([5, 39, 2])
  numbers = [[-1.5, -2.25], [-3.0, -0.1], [-1.0, -9.0]]
  table = mapped(tmp_path, UNITS, 'comparison', (1, 39)).take(order)
  changed = add_values(share_prompts(table), 'reference', numbers)
  assert_same(changed, add_values(share_prompts(taken), 'reference', numbers), PREFER)
  assert shared_counts(changed).any() and not shared_counts(table).any()


def test_a_table_is_refused_for_the_fault_of_its_list():
  first, second = UNITS[1].segments
  unlearned = second._replace(loss_mask=np.arange(len(second.tokens)) == 0)
  check_units(stack_units(UNITS, 'comparison'), 'comparison', ['margin'])
  for changed, needed, names in (
    (UNITS[1]._replace(segments=(first, unlearned)), (), None),
    (UNITS[1]._replace(values={'probability': (1.5, 0.0), 'margin': (0.0, 0.0)}), (), None),
    (UNITS[1]._replace(values={'probability': (0.5, 0.5), 'margin': (np.inf, 0.0)}), (), None),
    (UNITS[1], ('desirable',), None),
    (UNITS[1], (), ('probability',)),
  ):
    units = [UNITS[0], changed, *UNITS[2:]]
    messages = []
    for items in (units, stack_units(units, 'comparison')):
      with pytest.raises(UserError) as error:
        check_units(items, 'comparison', needed, names)
      messages.append(str(error.value))
    assert messages[0] == messages[1] and 'pair' in messages[0]
  with pytest.raises(UserError, match='which have 1'):
    check_units(stack_units(UNITS, 'comparison'), 'sequence')
  check_units(stack_units((), 'comparison'), 'comparison')


def test_ragged_rows_are_taken_and_joined():
  rows = Ragged.of_lengths(np.arange(6), [2, 0, 3, 1])
  assert list(rows.take(np.array([2, 1, 0, 2])).rows()) == [(2, 3, 4), (), (0, 1), (2, 3, 4)]
  joined = Ragged.join([rows, rows.take(np.array([3], np.int64))])
  assert joined.size == 5 and joined.lengths.tolist() == [2, 0, 3, 1, 1]
