"""Packing: every example is in every epoch once, whole, and padding is zero."""

import collections
import hashlib

import numpy as np
import pytest

from cai_jax.data import packing
from cai_jax.data.units import Example
from cai_jax.runtime.errors import UserError
from tests.training_setup import random_examples

LENGTHS = np.random.default_rng(0).integers(3, 33, 400)


def test_pack_puts_each_example_into_one_row_that_holds_it():
  order = np.random.default_rng(1).permutation(len(LENGTHS))
  rows = packing.pack(LENGTHS, order, 40)
  assert sorted(i for r in rows for i in r) == list(range(len(LENGTHS)))
  assert all(0 < sum(LENGTHS[i] for i in r) <= 40 for r in rows)
  assert len(rows) < 1.1 * LENGTHS.sum() / 40  # little padding


@pytest.mark.parametrize(
  'buckets',
  [
    [packing.Bucket(32, 8)],
    [packing.Bucket(64, 4)],
    [packing.Bucket(32, 4), packing.Bucket(16, 8)],
  ],
)
def test_every_example_occurs_once_per_epoch(buckets):
  steps = packing.plan(LENGTHS, buckets, epochs=3, seed=5)
  counts = collections.Counter(i for step in steps for r in step.rows for i in r)
  assert counts == {i: 3 for i in range(len(LENGTHS))}
  first = [i for step in steps[: len(steps) // 3 - 2] for r in step.rows for i in r]
  assert len(first) == len(set(first))
  for step in steps:
    assert step.bucket in buckets and 0 < len(step.rows) <= step.bucket.rows
    assert all(sum(LENGTHS[i] for i in r) <= step.bucket.length for r in step.rows)
  assert steps == packing.plan(LENGTHS, buckets, epochs=3, seed=5)
  assert steps != packing.plan(LENGTHS, buckets, epochs=3, seed=6)


def test_an_example_goes_to_the_shortest_rows_that_hold_it():
  for step in packing.plan(LENGTHS, [packing.Bucket(32, 4), packing.Bucket(16, 8)], 1, 0):
    lengths = [LENGTHS[i] for r in step.rows for i in r]
    assert max(lengths) <= 16 if step.bucket.length == 16 else min(lengths) > 16


def test_plan_refuses_an_example_that_does_not_fit():
  with pytest.raises(UserError, match='32 tokens does not fit rows of 31'):
    packing.plan([4, 32], [packing.Bucket(31, 2)], 1, 0)
  with pytest.raises(UserError, match='no example'):
    packing.plan([], [packing.Bucket(31, 2)], 1, 0)


def test_a_batch_holds_each_example_whole_and_padding_is_zero():
  rng = np.random.default_rng(2)
  examples = [
    Example(rng.integers(1, 99, n).astype(np.int32), rng.random(n) < 0.5) for n in LENGTHS[:60]
  ]
  steps = packing.plan([len(e.tokens) for e in examples], [packing.Bucket(48, 7)], 1, 0)
  batches = packing.Batches(examples, steps)
  assert min(len(step.rows) for step in steps) < 7  # empty rows fill one of them
  num_tokens = 0
  for step, batch in zip(steps, batches, strict=True):
    for name in batch:
      assert batch[name].shape == (7, 48) and batch[name].dtype == np.int32
      assert not batch[name][batch['segment_ids'] == 0].any()
    for r, indices in enumerate(step.rows):
      for segment, i in enumerate(indices, start=1):
        span = batch['segment_ids'][r] == segment
        np.testing.assert_array_equal(batch['tokens'][r, span], examples[i].tokens)
        np.testing.assert_array_equal(batch['loss_mask'][r, span], examples[i].loss_mask)
        np.testing.assert_array_equal(batch['positions'][r, span], np.arange(span.sum()))
        num_tokens += span.sum()
  assert packing.padding_share(examples, steps) == pytest.approx(
    1 - num_tokens / (len(steps) * 7 * 48)
  )


def test_the_iterator_resumes_from_its_state():
  examples = [Example(np.full(4, i, np.int32), np.ones(4, bool)) for i in range(40)]
  batches = packing.Batches(examples, packing.plan([4] * 40, [packing.Bucket(8, 2)], 1, 0))
  iterator = packing.iterate_batches(batches, lambda b: b['tokens'])
  for _ in range(3):
    next(iterator)
  state = iterator.get_state()
  rest = [x.tolist() for x in iterator]
  resumed = packing.iterate_batches(batches, lambda b: b['tokens'])
  resumed.set_state(state)
  assert [x.tolist() for x in resumed] == rest and len(rest) == len(batches) - 3


def test_each_example_goes_to_the_first_of_the_fullest_rows_that_hold_it():
  sizes = np.random.default_rng(0).integers(1, 65, 500)
  rows, free = [], []
  for i in np.argsort(-sizes, kind='stable').tolist():
    fits = [(left - sizes[i], row) for row, left in enumerate(free) if left >= sizes[i]]
    row = min(fits)[1] if fits else len(rows)
    if not fits:
      rows.append([])
      free.append(64)
    rows[row].append(i)
    free[row] -= sizes[i]
  assert packing.pack(sizes, range(500), 64) == [tuple(row) for row in rows]


def test_steps_are_a_sequence_with_the_digest_of_a_list():
  steps = packing.plan([3, 5, 2, 8, 1], [packing.Bucket(8, 2)], 2, 0)
  listed = list(steps)
  assert steps == listed and repr(steps) == repr(listed) and steps[-1] == listed[-1]
  assert steps.digest == hashlib.sha256(repr(listed).encode()).hexdigest()
  with pytest.raises(IndexError):
    steps[len(steps)]


def test_a_process_builds_only_its_own_rows():
  examples, whole_rows = random_examples(40), packing.Bucket(32, 4)
  steps = packing.plan([len(e.tokens) for e in examples], [whole_rows], 1, 0)

  class Reading(list):
    def __getitem__(self, index):
      read.add(index)
      return super().__getitem__(index)

  read = set()
  batches = packing.Batches(Reading(examples), steps, lambda bucket: {1, 3})
  read.clear()
  batch, whole = batches[0], packing.Batches(examples, steps)[0]
  assert read == {i for r in (1, 3) for i in steps[0].rows[r]}
  for name in batch:
    np.testing.assert_array_equal(batch[name][1::2], whole[name][1::2])
    assert not batch[name][::2].any() and whole[name][::2].any()
