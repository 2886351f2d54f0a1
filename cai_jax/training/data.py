"""D_CAI to batches: rows → examples → tokens with a loss mask → packed rows → steps.

All examples are tokenised before training, so every drop is counted, and the number of steps known,
before the first step. Which example stands in which row of which step is then a pure function of
the examples' lengths and the seed (`plan`): the same on every host and for any number of devices.
"""

import collections
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
import tensorflow_datasets as tfds

from cai_jax import quality

HELPFUL = 'helpful'  # `kind` of the rows whose initial answer can be mixed in
PACKED_TOGETHER = 4096  # examples whose rows are open at a time


class Example(NamedTuple):
  """One sequence: tokens i32[T], loss_mask bool[T], true on the tokens to learn, and its row."""

  tokens: np.ndarray
  loss_mask: np.ndarray
  id: str = ''  # of the row of D_CAI


@dataclasses.dataclass(frozen=True)
class Examples:
  """Examples, with counts: rows, kept, helpful (of those kept), dropped by reason."""

  items: tuple[Example, ...]
  counts: dict[str, Any]


class Rows:
  """Rows of D_CAI as plain dicts with str texts and lists of dicts, read as they are asked for."""

  def __init__(self, source):
    self._source = source

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    if not 0 <= index < len(self):
      raise IndexError(index)
    return _plain(self._source[index])


def read_rows(directory: str | os.PathLike, split: str = 'train') -> Rows:
  """Rows of a TFDS dataset on disk (ArrayRecord), in any order.

  Raises:
    ValueError: if the folder holds no such dataset, or the dataset no such split.
  """
  try:
    builder = tfds.builder_from_directory(os.fspath(directory))
  except OSError as error:
    raise ValueError(f'{directory} holds no TFDS dataset ({error}): generate it first.') from error
  if split not in builder.info.splits:
    raise ValueError(
      f'{directory} has no split {split!r}; it has {sorted(builder.info.splits)}: name one of them.'
    )
  return Rows(builder.as_data_source(split))


def _plain(value):
  """`value` in plain types: bytes decoded, and `prompt` and `rounds` as lists of dicts."""
  if isinstance(value, bytes):
    return value.decode()
  if isinstance(value, np.generic):
    return value.item()
  if isinstance(value, np.ndarray):
    return _plain(value.tolist())
  if isinstance(value, list | tuple):
    return [_plain(v) for v in value]
  if not isinstance(value, Mapping):
    return value
  return {
    k: _transpose(_plain(v)) if k in ('prompt', 'rounds') else _plain(v) for k, v in value.items()
  }


def _transpose(value):
  """A list of dicts, for one or for a dict of lists (in which TFDS gives a sequence of dicts)."""
  if isinstance(value, list):
    return value

  def length(node):
    return length(next(iter(node.values()))) if isinstance(node, dict) else len(node)

  def pick(node, i):
    return {k: pick(v, i) for k, v in node.items()} if isinstance(node, dict) else node[i]

  return [pick(value, i) for i in range(length(value))]


def examples(
  rows: Sequence[Mapping[str, Any]],
  dialogue,
  *,
  target: str = 'last',
  helpfulness_share: float = 0.0,
  max_length: int = 1024,
  drop_truncated: bool = True,
  filters: Sequence[str] = (),
  known: quality.References | None = None,
  seed: int = 0,
) -> Examples:
  """The examples of D_CAI, in the order of its rows; helpfulness examples stand at the end.

  Args:
    rows: each has `id`, `kind`, `prompt` (messages), `initial` {text, finish_reason}, `rounds` of
      {revision: {text, finish_reason}}.
    dialogue: `cai_jax.dialogue.Dialogue`.
    target: 'last' revision, 'all' revisions, or 'initial' answer of each row not of kind 'helpful'.
    helpfulness_share: share of all examples that are the initial answer of a row of kind 'helpful';
      which rows, the seed decides. Rows of this kind are used for nothing else.
    max_length: tokens; a longer example is dropped.
    drop_truncated: drop a text that ended by the length limit; else it is learnt as if whole.
    filters: names of `quality.FLAGS`; a text with any of them is dropped as 'filtered_' + the first
      of those it has, in the order given. The rows stay as they are.
    known: the constitution's `quality.references`, for the filters that need them.

  Raises:
    ValueError: if no example is left, or too few for the helpfulness share; if a filter needs
      `known`.
  """
  needing = [name for name in filters if name in quality.OF_REFERENCES]
  if needing and known is None:
    raise ValueError(
      f'train.filters: {", ".join(needing)} is told by the principles and demonstrations: give '
      "`known`, the constitution's quality.references."
    )
  dropped = collections.Counter()
  kept, helpful = [], []
  for i in range(len(rows)):
    row = rows[i]
    is_helpful = row['kind'] == HELPFUL
    if is_helpful and not helpfulness_share:
      dropped['helpful_not_asked_for'] += 1
      continue
    if is_helpful or target == 'initial':
      rounds = [-1]  # y_init
    else:
      rounds = list(range(len(row['rounds'])))
      rounds = rounds[-1:] if target == 'last' else rounds
      if not rounds:
        dropped['no_revision'] += 1
    for at in rounds:
      reply = row['initial'] if at < 0 else row['rounds'][at]['revision']
      example = _filtered(row, at, filters, known) or _example(
        row, reply, dialogue, max_length, drop_truncated
      )
      if isinstance(example, str):
        dropped[example] += 1
      else:
        (helpful if is_helpful else kept).append(example)
  wanted = round(helpfulness_share * len(kept) / (1 - helpfulness_share))
  if wanted > len(helpful):
    raise ValueError(
      f'train.helpfulness_share={helpfulness_share} beside {len(kept)} other examples needs '
      f'{wanted} helpfulness examples, and the data set has {len(helpful)}: generate more helpful '
      'prompts, or ask for a smaller share.'
    )
  if not kept:
    raise ValueError(
      f'no example is left of {len(rows)} rows for train.target={target!r}; dropped: '
      f"{dict(dropped)}. 'truncated' were cut at sampling.*.max_tokens: raise it, or set "
      f"train.drop_truncated=False; 'too_long' exceed train.max_length={max_length}; 'filtered_' "
      f'have a defect of train.filters={tuple(filters)}.'
    )
  if helpful:
    chosen = np.sort(np.random.default_rng([seed, 1]).permutation(len(helpful))[:wanted])
    dropped['helpful_beyond_share'] += len(helpful) - wanted
    helpful = [helpful[i] for i in chosen]
  counts = {
    'rows': len(rows),
    'kept': len(kept) + len(helpful),
    'helpful': len(helpful),
    'dropped': {reason: n for reason, n in sorted(dropped.items()) if n},
  }
  return Examples(tuple(kept + helpful), counts)


def hold_out(
  items: Sequence[Example], share: float, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
  """(examples to train on, examples held out): `share` of the rows, which the seed chooses.

  All examples of a row are on the same side.

  Raises:
    ValueError: if that leaves none on a side.
  """
  if not share:
    return tuple(items), ()
  rows = list(dict.fromkeys(item.id for item in items))
  count = max(round(share * len(rows)), 1)
  if count >= len(rows):
    raise ValueError(
      f'train.eval_share={share} of {len(rows)} rows leaves none to train on: lower it.'
    )
  chosen = {rows[i] for i in np.random.default_rng([seed, 2]).permutation(len(rows))[:count]}
  return (
    tuple(item for item in items if item.id not in chosen),
    tuple(item for item in items if item.id in chosen),
  )


def _filtered(row, at: int, filters: Sequence[str], known) -> str | None:
  """The reason to filter out the revision of a round (-1: y_init), if there is one."""
  found = quality.row_flags(row, at, known) if filters else ()
  return next((f'filtered_{name}' for name in filters if name in found), None)


def _example(row, reply, dialogue, max_length, drop_truncated) -> Example | str:
  """The example of a reply, or the reason to drop it."""
  if not reply['text'].strip():
    return 'empty'
  if drop_truncated and reply['finish_reason'] == 'length':
    return 'truncated'
  messages = [{'role': m['role'], 'content': m['content']} for m in row['prompt']]
  tokens, mask = dialogue.example([*messages, {'role': 'assistant', 'content': reply['text']}])
  if len(tokens) > max_length:
    return 'too_long'
  return Example(np.asarray(tokens, np.int32), np.asarray(mask, bool), row['id'])


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
    raise ValueError('there is no example to train on.')
  if lengths.max() > buckets[-1].length:
    raise ValueError(
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
