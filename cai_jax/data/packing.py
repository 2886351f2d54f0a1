"""Packed batches: several examples share a row, and a plan assigns examples to rows and steps.

What is packed is an `Example`, or a `Unit` of several segments, which stay together in one row.

All examples are tokenized before training. The number of steps and of dropped examples is therefore
known before the first step. The plan is a pure function of the examples' lengths and the seed, so
it is the same on every host and for any number of devices.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from cai_jax.data.examples import Example
from cai_jax.data.units import ARRAYS, LAST_SEGMENTS, Unit, as_unit, unit_lengths
from cai_jax.runtime.errors import UserError

PACKING_WINDOW = 4096  # consecutive examples that are packed together

# A run's plan is identified by a digest of `repr(steps)`. Renaming `Bucket`, `Step` or their fields
# would change it, and earlier checkpoints could no longer be resumed.


class Bucket(NamedTuple):
  """The shape of a batch: `rows` rows of `length` tokens."""

  length: int
  rows: int


class Step(NamedTuple):
  """One batch: its shape, and the indices of the examples in each of its rows."""

  bucket: Bucket
  rows: tuple[tuple[int, ...], ...]


def pack(
  lengths: Sequence[int] | np.ndarray, order: Sequence[int] | np.ndarray, row_length: int
) -> list[tuple[int, ...]]:
  """Assign examples to rows by best fit decreasing.

  Each window of `PACKING_WINDOW` examples is packed on its own. Its examples are taken from the
  longest to the shortest, and each goes to the fullest row that still has room for it.

  Args:
    lengths: number of tokens of each example.
    order: indices of the examples to pack, in the order in which they form windows.
    row_length: number of tokens that a row holds.

  Returns:
    The rows, each as indices into `lengths`.
  """
  packed: list[tuple[int, ...]] = []
  for begin in range(0, len(order), PACKING_WINDOW):
    window = np.asarray(order[begin : begin + PACKING_WINDOW])
    sizes = np.asarray(lengths)[window]
    rows: list[list[int]] = []
    free = np.zeros(len(window), np.int64)  # tokens left in each row
    for i in np.argsort(-sizes, kind='stable'):
      left = free[: len(rows)] - sizes[i]
      fits = np.flatnonzero(left >= 0)
      row = fits[left[fits].argmin()] if fits.size else len(rows)
      if row == len(rows):
        rows.append([])
        free[row] = row_length
      rows[row].append(int(window[i]))
      free[row] -= sizes[i]
    packed += map(tuple, rows)
  return packed


def plan(
  lengths: Sequence[int] | np.ndarray, buckets: Sequence[Bucket], epochs: int, seed: int
) -> list[Step]:
  """Return the steps of a run, in which every example occurs once per epoch in random order.

  An example goes to the bucket with the shortest rows that hold it. If the last rows of a bucket do
  not fill a batch, they move to its first batch of the next epoch. In the last epoch, `Batches`
  fills that batch with empty rows.

  Args:
    lengths: number of tokens of each example.
    buckets: the batch shapes.
    epochs: number of times that each example occurs.
    seed: chooses the order.

  Raises:
    UserError: if there is no example, or one is longer than the rows of every bucket.
  """
  sizes = np.asarray(lengths)
  buckets = sorted(buckets)
  if not sizes.size:
    raise UserError('There is no example to train on. Give at least one.')
  if sizes.max() > buckets[-1].length:
    raise UserError(
      f'An example of {sizes.max()} tokens does not fit rows of {buckets[-1].length}. Drop '
      'it, or use longer rows.'
    )
  bucket_indices = np.searchsorted([bucket.length for bucket in buckets], sizes)
  steps: list[Step] = []
  waiting: list[list[tuple[int, ...]]] = [[] for _ in buckets]  # rows that filled no batch yet
  for epoch in range(epochs):
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(sizes))
    epoch_steps = []
    for k, bucket in enumerate(buckets):
      rows = pack(sizes, order[bucket_indices[order] == k], bucket.length)
      rows = waiting[k] + [rows[i] for i in rng.permutation(len(rows))]
      end = len(rows) if epoch == epochs - 1 else len(rows) // bucket.rows * bucket.rows
      for begin in range(0, end, bucket.rows):
        epoch_steps.append(Step(bucket, tuple(rows[begin : begin + bucket.rows])))
      waiting[k] = rows[end:]
    steps += [epoch_steps[i] for i in rng.permutation(len(epoch_steps))]
  return steps


class Batches:
  """A sequence of the batches of a plan, made on access.

  A batch is a dict of `tokens`, `positions`, `segment_ids` and `loss_mask`, each i32[rows, length].
  Positions count from 0 in each segment and segments from 1 in each row; padding is 0 in all four.
  For each value of the units, a batch also has an array f32[rows, length], whose column s - 1 is
  the value of segment s of the row; the other columns are 0. The segments of a unit follow each
  other. So if every unit has n segments, unit k of a row, from 0, has the columns n * k to
  n * k + n - 1.

  If units share tokens, a batch also has `last_segment_ids`, i32[rows, length]. The shared tokens
  of a unit stand in its first segment, and this array has the number of its last one there; at
  other tokens it equals `segment_ids`. The positions of the other segments continue after the
  shared tokens.

  Every host builds the whole batch, and each of its devices takes its own part.

  Args:
    examples: the examples or units that the plan's indices refer to; see `units.check_units`.
    steps: the plan.
  """

  def __init__(self, examples: Sequence[Example | Unit], steps: Sequence[Step]):
    self._examples, self._steps = examples, steps
    self._values = tuple(as_unit(examples[0]).values) if len(examples) else ()
    shares = any(as_unit(example).shared for example in examples)
    self._arrays = (*ARRAYS, LAST_SEGMENTS) if shares else ARRAYS

  def __len__(self) -> int:
    return len(self._steps)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    bucket, rows = self._steps[index]
    batch = {name: np.zeros((bucket.rows, bucket.length), np.int32) for name in self._arrays}
    batch |= {name: np.zeros((bucket.rows, bucket.length), np.float32) for name in self._values}
    for r, row in enumerate(rows):
      begin = segment = 0
      for i in row:
        unit = as_unit(self._examples[i])
        for name in self._values:
          batch[name][r, segment : segment + len(unit.segments)] = unit.values[name]
        last = segment + len(unit.segments)
        if unit.shared:
          batch[LAST_SEGMENTS][r, begin : begin + unit.shared] = last
        for number, (tokens, mask, _) in enumerate(unit.segments):
          segment += 1
          skipped = unit.shared if number else 0
          span = slice(begin, begin + len(tokens) - skipped)
          batch['tokens'][r, span] = tokens[skipped:]
          batch['positions'][r, span] = np.arange(skipped, len(tokens))
          batch['segment_ids'][r, span] = segment
          batch['loss_mask'][r, span] = mask[skipped:]
          begin = span.stop
    if LAST_SEGMENTS in batch:
      batch[LAST_SEGMENTS] = np.maximum(batch[LAST_SEGMENTS], batch['segment_ids'])
    return batch

  def example_ids(self, index: int) -> list[str]:
    """Return the id of each example in a batch, or its index if it has no id.

    Args:
      index: the index of the batch.
    """
    indices = (i for row in self._steps[index].rows for i in row)
    return [self._examples[i].id or f'example {i}' for i in indices]


def padding_share(examples: Sequence[Example | Unit], steps: Sequence[Step]) -> float:
  """Return the share of padding among all positions of all batches.

  Args:
    examples: the examples or units.
    steps: the plan, see `plan`.
  """
  positions = sum(step.bucket.rows * step.bucket.length for step in steps)
  lengths = unit_lengths(examples)
  tokens = sum(lengths[i] for step in steps for row in step.rows for i in row)
  return 1 - tokens / positions


def iterate_batches(
  batches: Batches, place: Callable[[dict[str, np.ndarray]], Any]
) -> grain.DatasetIterator:
  """Return an iterator over the batches in order, which prepares the next ones in the background.

  The iterator's state is the index of the next batch, so it can be saved and restored.

  Args:
    batches: the batches.
    place: applied to each batch, for example to put it on the devices.
  """
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
  return iter(grain.MapDataset.source(batches).map(place).to_iter_dataset(options))
