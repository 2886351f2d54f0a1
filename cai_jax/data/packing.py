"""D_CAI to batches: rows → examples → tokens with a loss mask → packed rows → steps.

All examples are tokenised before training, so every drop is counted, and the number of steps known,
before the first step. Which example stands in which row of which step is then a pure function of
the examples' lengths and the seed (`plan`): the same on every host and for any number of devices.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from cai_jax.data.examples import Example
from cai_jax.runtime.errors import UserError

PACKED_TOGETHER = 4096  # examples whose rows are open at a time


class Bucket(NamedTuple):
  """Shape of a batch: `rows` rows of `length` tokens."""

  length: int
  rows: int


class Step(NamedTuple):
  """One batch: its shape, and the indices of the examples in each of its rows."""

  bucket: Bucket
  rows: tuple[tuple[int, ...], ...]


def pack(lengths: Sequence[int], order: Sequence[int], row_length: int) -> list[tuple[int, ...]]:
  """Rows of indices into `lengths`, none over row_length.

  PACKED_TOGETHER examples of the given order at a time, the longest first, each go to the fullest
  row that still holds them (best fit decreasing), so that the short ones fill what is left.
  """
  done = []
  for begin in range(0, len(order), PACKED_TOGETHER):
    together = np.asarray(order[begin : begin + PACKED_TOGETHER])
    sizes = np.asarray(lengths)[together]
    rows, free = [], np.zeros(len(together), np.int64)
    for at in np.argsort(-sizes, kind='stable'):
      left = free[: len(rows)] - sizes[at]
      fits = np.flatnonzero(left >= 0)
      row = fits[left[fits].argmin()] if fits.size else len(rows)
      if row == len(rows):
        rows.append([])
        free[row] = row_length
      rows[row].append(int(together[at]))
      free[row] -= sizes[at]
    done += map(tuple, rows)
  return done


def plan(lengths: Sequence[int], buckets: Sequence[Bucket], epochs: int, seed: int) -> list[Step]:
  """The steps of a run: every example `epochs` times, once an epoch, in an order from the seed.

  An example goes to the shortest rows that hold it. Rows that do not fill an epoch's last step of a
  bucket begin the next epoch's; those of the last epoch `Batches` fills up with empty ones.

  Raises:
    ValueError: if an example is longer than every bucket's rows, or there is none.
  """
  lengths = np.asarray(lengths)
  buckets = sorted(buckets)
  if not lengths.size:
    raise UserError('there is no example to train on.')
  if lengths.max() > buckets[-1].length:
    raise UserError(
      f'an example of {lengths.max()} tokens does not fit rows of {buckets[-1].length}: drop it.'
    )
  bucket_of = np.searchsorted([b.length for b in buckets], lengths)
  steps, waiting = [], {k: [] for k in range(len(buckets))}
  for epoch in range(epochs):
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    of_epoch = []
    for k, bucket in enumerate(buckets):
      rows = pack(lengths, order[bucket_of[order] == k], bucket.length)
      rows = waiting[k] + [rows[i] for i in rng.permutation(len(rows))]
      end = len(rows) if epoch == epochs - 1 else len(rows) // bucket.rows * bucket.rows
      for at in range(0, end, bucket.rows):
        of_epoch.append(Step(bucket, tuple(rows[at : at + bucket.rows])))
      waiting[k] = rows[end:]
    steps += [of_epoch[i] for i in rng.permutation(len(of_epoch))]
  return steps


class Batches:
  """Random access to the batches of a plan: dicts of tokens, positions, segment_ids, loss_mask.

  Each is i32[rows, length]. Segments count from 1 in each row and padding is 0 in all four; the
  whole batch, of all hosts, is built, and each host's devices take their part of it.
  """

  def __init__(self, items: Sequence[Example], steps: Sequence[Step]):
    self._items, self._steps = items, steps

  def __len__(self) -> int:
    return len(self._steps)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    step = self._steps[index]
    names = ('tokens', 'positions', 'segment_ids', 'loss_mask')
    batch = {name: np.zeros(tuple(reversed(step.bucket)), np.int32) for name in names}
    for r, row in enumerate(step.rows):
      at = 0
      for segment, i in enumerate(row, start=1):
        tokens, mask, _ = self._items[i]
        place = slice(at, at + len(tokens))
        batch['tokens'][r, place] = tokens
        batch['positions'][r, place] = np.arange(len(tokens))
        batch['segment_ids'][r, place] = segment
        batch['loss_mask'][r, place] = mask
        at += len(tokens)
    return batch

  def ids(self, index: int) -> list[str]:
    """Rows of D_CAI in a batch; an example without one goes by its number."""
    found = (i for row in self._steps[index].rows for i in row)
    return [self._items[i].id or f'example {i}' for i in found]


def padding_share(items: Sequence[Example], steps: Sequence[Step]) -> float:
  """Share of all places of all batches that hold no token."""
  places = sum(step.bucket.rows * step.bucket.length for step in steps)
  held = sum(len(items[i].tokens) for step in steps for row in step.rows for i in row)
  return 1 - held / places


def iterate(
  batches: Batches, place: Callable[[dict[str, np.ndarray]], Any]
) -> grain.DatasetIterator:
  """The batches in order, each through `place`, made ahead; its state is the next one's index."""
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
  return iter(grain.MapDataset.source(batches).map(place).to_iter_dataset(options))
