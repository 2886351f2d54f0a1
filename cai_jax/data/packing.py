"""Packed batches: several examples share a row, and a plan assigns examples to rows and steps.

What is packed is an `Example`, or a `Unit` of several segments, which stay together in one row.

All examples are tokenized before training. The number of steps and of dropped examples is therefore
known before the first step. The plan is a pure function of the examples' lengths and the seed, so
it is the same on every host and for any number of devices.
"""

import hashlib
import heapq
from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from cai_jax.data.ragged import Ragged
from cai_jax.data.units import (
  ARRAYS,
  LAST_SEGMENTS,
  Example,
  Unit,
  as_unit,
  shared_counts,
  unit_lengths,
)
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


def step_examples(step: Step) -> list[int]:
  """Return the indices of the examples of a step, in the order of its rows."""
  return [i for row in step.rows for i in row]


class Steps(Sequence[Step]):
  """The steps of a plan, in a few bytes for each example.

  Args:
    buckets: the batch shapes.
    shapes: i64[steps], the index of each step's bucket.
    row_counts: i64[steps], the number of rows of each step.
    rows: the indices of the examples in each row, of all steps.
  """

  def __init__(
    self, buckets: Sequence[Bucket], shapes: np.ndarray, row_counts: np.ndarray, rows: Ragged
  ):
    self._buckets, self._shapes, self._rows = buckets, shapes, rows
    self._ends = np.concatenate([[0], np.cumsum(row_counts)])

  def __len__(self) -> int:
    return len(self._shapes)

  def __getitem__(self, index: Any) -> Any:
    if isinstance(index, slice):
      return [self[i] for i in range(len(self))[index]]
    if not -len(self) <= index < len(self):
      raise IndexError(index)
    index %= len(self)
    rows = range(self._ends[index], self._ends[index + 1])
    shape = self._buckets[self._shapes[index]]
    return Step(shape, tuple(tuple(self._rows.row(i).tolist()) for i in rows))

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Sequence) and list(self) == list(other)

  __hash__ = None  # type: ignore[assignment]

  def __repr__(self) -> str:
    return f'[{", ".join(map(repr, self))}]'

  @property
  def digest(self) -> str:
    """The SHA-256 of `repr(list(self))`, by which a run's plan is identified."""
    digest = hashlib.sha256()
    for number, step in enumerate(self):
      digest.update(f'{", " if number else "["}{step!r}'.encode())
    digest.update(b']' if len(self) else b'[]')
    return digest.hexdigest()


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
  return list(_pack(np.asarray(lengths), np.asarray(order, np.int64), row_length).rows())


def _pack(lengths: np.ndarray, order: np.ndarray, row_length: int) -> Ragged:
  """Return what `pack` returns."""
  packed = [Ragged.of_lengths(order[:0], [])]
  for begin in range(0, len(order), PACKING_WINDOW):
    window = order[begin : begin + PACKING_WINDOW]
    sizes = lengths[window]
    longest_first = np.argsort(-sizes, kind='stable')
    rows = _fit_best(sizes[longest_first].tolist(), row_length)
    by_row = np.argsort(rows, kind='stable')
    packed.append(Ragged.of_lengths(window[longest_first[by_row]], np.bincount(rows)))
  return Ragged.join(packed)


def _fit_best(sizes: Sequence[int], row_length: int) -> list[int]:
  """Return for each size the first of the fullest rows that have room for it.

  Args:
    sizes: at most `row_length` each, in the order in which they are placed.
    row_length: number of tokens that a row holds.
  """
  waiting: dict[int, list[int]] = {}  # tokens left → a heap of the rows with that many
  known = 0  # bit n is set if there are rows with n tokens left
  chosen, count = [], 0
  for size in sizes:
    if room := known >> size:
      left = size + (room & -room).bit_length() - 1  # the lowest bit that is set
      row = heapq.heappop(waiting[left])
      if not waiting[left]:
        known ^= 1 << left
    else:
      left, row, count = row_length, count, count + 1
    chosen.append(row)
    heapq.heappush(waiting.setdefault(left - size, []), row)
    known |= 1 << (left - size)
  return chosen


def plan(
  lengths: Sequence[int] | np.ndarray, buckets: Sequence[Bucket], epochs: int, seed: int
) -> Steps:
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
  nothing = Ragged.of_lengths(np.zeros(0, np.int32), [])
  waiting = [nothing for _ in buckets]  # rows that filled no batch yet
  shapes, counts, planned = [], [], [nothing]
  for epoch in range(epochs):
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(sizes)).astype(np.int32)
    epoch_rows, epoch_shapes, epoch_counts = [], [], []
    for k, bucket in enumerate(buckets):
      rows = _pack(sizes, order[bucket_indices[order] == k], bucket.length)
      rows = Ragged.join([waiting[k], rows.take(rng.permutation(rows.size))])
      end = rows.size if epoch == epochs - 1 else rows.size // bucket.rows * bucket.rows
      begins = np.arange(0, end, bucket.rows)
      epoch_rows.append(rows.take(np.arange(end)))
      epoch_shapes.append(np.full(len(begins), k))
      epoch_counts.append(np.minimum(bucket.rows, end - begins))
      waiting[k] = rows.take(np.arange(end, rows.size))
    count_of = np.concatenate(epoch_counts)
    steps = rng.permutation(len(count_of))
    numbers = Ragged.of_lengths(np.arange(count_of.sum()), count_of).take(steps).values
    planned.append(Ragged.join(epoch_rows).take(numbers))
    shapes.append(np.concatenate(epoch_shapes)[steps])
    counts.append(count_of[steps])
  return Steps(buckets, np.concatenate(shapes), np.concatenate(counts), Ragged.join(planned))


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

  Args:
    examples: the examples or units that the plan's indices refer to; see `units.check_units`.
    steps: the plan.
    rows_here: function from the shape of a batch to the numbers of the rows that this process
      needs. The other rows stay 0, without reading their examples. By default it needs all.
  """

  def __init__(
    self,
    examples: Sequence[Example | Unit],
    steps: Sequence[Step],
    rows_here: Callable[[Bucket], Container[int]] = lambda bucket: range(bucket.rows),
  ):
    self._examples, self._steps, self._rows_here = examples, steps, rows_here
    self._values = tuple(as_unit(examples[0]).values) if len(examples) else ()
    shares = bool(shared_counts(examples).any())
    self._arrays = (*ARRAYS, LAST_SEGMENTS) if shares else ARRAYS

  def __len__(self) -> int:
    return len(self._steps)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    bucket, rows = self._steps[index]
    batch = {name: np.zeros((bucket.rows, bucket.length), np.int32) for name in self._arrays}
    batch |= {name: np.zeros((bucket.rows, bucket.length), np.float32) for name in self._values}
    needed = self._rows_here(bucket)
    for r, row in enumerate(rows):
      if r not in needed:
        continue
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
    indices = step_examples(self._steps[index])
    return [self._examples[i].id or f'example {i}' for i in indices]


def padding_share(examples: Sequence[Example | Unit], steps: Sequence[Step]) -> float:
  """Return the share of padding among all positions of all batches.

  Args:
    examples: the examples or units.
    steps: the plan, see `plan`.
  """
  positions = sum(step.bucket.rows * step.bucket.length for step in steps)
  lengths = np.asarray(unit_lengths(examples))
  tokens = sum(int(lengths[step_examples(step)].sum()) for step in steps)
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
