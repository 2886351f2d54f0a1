"""Units of training from preferences: token ids with a loss mask for each response."""

import collections
import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import numpy as np

from cai_jax.data.part_files import Maker, Source, map_parts
from cai_jax.data.preferences.comparisons import Comparison, JudgedResponse
from cai_jax.data.preferences.unit_maker import (
  PROMPT,
  ComparisonMaker,
  JudgedMaker,
  Render,
  RenderReplies,
)
from cai_jax.data.unit_table import Part, UnitTable
from cai_jax.dialogue import Dialogue
from cai_jax.runtime.errors import UserError

_BLOCK = 1024  # targets that are searched together
_MADE_TOGETHER = 4096  # rows of a part in memory


@dataclasses.dataclass(frozen=True)
class UnitSet:
  """Units and how they were chosen.

  Attributes:
    units: the units that were kept, in the order of the data.
    counts: how many comparisons or judged responses there were ('rows'), how many units were
      `kept`, and how many were `dropped`, by reason.
  """

  units: UnitTable
  counts: dict[str, Any]


def build_comparison_units(
  comparisons: Iterable[Comparison],
  dialogue: Dialogue,
  *,
  max_length: int = 1024,
  drop_truncated: bool = True,
  margins: bool = False,
  folder: str | os.PathLike | None = None,
) -> UnitSet:
  """Return a unit of two segments, `chosen` and `rejected`, for each comparison.

  The values of a unit are 'probability', that a segment is the better one, and, if asked for,
  'margin', by which a segment's score exceeds the other one's.

  Args:
    comparisons: the comparisons; they are read once.
    dialogue: renders conversations as tokens. The loss mask is that of supervised examples.
    max_length: maximum number of tokens of a unit, which is those of both sides together. Longer
      ones are dropped as 'too_long'; nothing is cut.
    drop_truncated: whether to drop comparisons with a text that was cut off at a length limit. If
      not, it is learned as if it were complete.
    margins: whether the units have margins.
    folder: where to keep the tokens in files, see `part_files.map_parts`; the comparisons are then
      also a `part_files.Source`, and all processes call this function together. None keeps them in
      memory.

  Raises:
    UserError: if no comparison remains, or one has no margin although `margins` is set.
  """
  render = RenderReplies(dialogue)
  return render_comparisons(comparisons, render, max_length, drop_truncated, margins, folder)


def render_comparisons(
  comparisons: Iterable[Comparison],
  render: Render,
  max_length: int,
  drop_truncated: bool,
  margins: bool,
  folder: str | os.PathLike | None = None,
) -> UnitSet:
  """Return a unit of the two segments of each comparison that `render` returns.

  The other arguments and the errors are those of `build_comparison_units`.

  Args:
    comparisons: the comparisons; they are read once.
    render: returns the segments of a comparison.
    max_length: maximum number of tokens of a unit.
    drop_truncated: whether to drop comparisons with a text that was cut off.
    margins: whether the units have margins.
    folder: where to keep the tokens in files, or None.
  """
  maker = ComparisonMaker(render, max_length, drop_truncated, margins)
  parts = _make_parts(comparisons, maker, folder)
  return _make_set(UnitTable(parts, 'comparison'), _count_dropped(parts), max_length)


def _make_parts(rows: Iterable[Any], maker: Maker, folder: str | os.PathLike | None) -> list[Part]:
  """Return the parts of all rows, in files of a folder or in memory; at least one."""
  if folder is not None:
    return map_parts(cast(Source, rows), maker, folder)
  remaining = iter(rows)
  blocks = iter(lambda: tuple(itertools.islice(remaining, _MADE_TOGETHER)), ())
  return list(map(maker.make_part, blocks)) or [maker.make_part(())]


def _count_dropped(parts: Sequence[Part]) -> collections.Counter[str]:
  """Return how often each reason dropped a row."""
  dropped: collections.Counter[str] = collections.Counter()
  for part in parts:
    dropped.update(part.counts)
  return dropped


def build_judged_units(
  responses: Iterable[JudgedResponse],
  dialogue: Dialogue,
  *,
  max_length: int = 1024,
  drop_truncated: bool = True,
  seed: int = 0,
  folder: str | os.PathLike | None = None,
) -> UnitSet:
  """Return a unit for each judged response: the response, and one to another prompt.

  The second segment has the same prompt and the response to another prompt. KTO estimates z₀, the
  divergence from the reference, from these mismatched pairs (Ethayarajh et al. 2024, section 4.1).
  The responses are put into a random order in which each gets the text of the next one that has
  another prompt and fits.

  The value 'desirable' of the first segment is 1 if the response is desirable, else 0; that of the
  second one is 0.

  Args:
    responses: the judged responses; they are read once.
    dialogue: renders conversations as tokens. The loss mask is that of supervised examples.
    max_length: maximum number of tokens of a unit, which has the prompt twice. Responses whose
      prompt leaves no room for another one are dropped as 'too_long'; nothing is cut.
    drop_truncated: as for `build_comparison_units`.
    seed: chooses the order.
    folder: as for `build_comparison_units`.

  Raises:
    UserError: if no response remains, or all of them have the same prompt.
  """
  parts = _make_parts(responses, JudgedMaker(dialogue, drop_truncated), folder)
  pieces, dropped = UnitTable(parts, 'judged'), _count_dropped(parts)
  prompts = _number_prompts(pieces)
  if len(pieces) and not prompts.any():
    raise UserError(
      f'All {len(pieces)} judged responses answer the same prompt, so none can be paired with a '
      'response to another prompt. Give responses to at least two prompts.'
    )
  others = _find_mismatches(pieces.segment_lengths(), prompts, max_length, seed)
  fitting = np.flatnonzero(others >= 0)
  dropped['too_long'] += len(pieces) - len(fitting)
  # Numbers of pieces: of each response its prompt and itself, and its prompt and the other one.
  own, other = np.arange(len(pieces)), np.maximum(others, 0)
  chosen = np.stack([2 * own, 2 * own + 1, 2 * own, 2 * other + 1], axis=1).reshape(-1, 2, 2)
  units = pieces.join_pieces(chosen).without_value(PROMPT).take(fitting)
  return _make_set(units, dropped, max_length)


def _number_prompts(pieces: UnitTable) -> np.ndarray:
  """Return a number for each judged response, i64[N]; those of equal prompts are equal, from 0."""
  if not len(pieces):
    return np.zeros(0, np.int64)
  high, low = pieces.values()[PROMPT].astype(np.uint64).T
  return np.unique(high << np.uint64(32) | low, return_inverse=True)[1].reshape(-1)


def _find_mismatches(
  lengths: np.ndarray, prompts: np.ndarray, max_length: int, seed: int
) -> np.ndarray:
  """Return for each response the index of one to another prompt that fits, or -1; i64[N].

  Args:
    lengths: i32[N,2], number of tokens of the prompt and of the response.
    prompts: i64[N], equal for responses to the same prompt.
    max_length: maximum number of tokens of a unit, which has the prompt twice.
    seed: chooses the order.
  """
  order = np.random.default_rng([seed, 3]).permutation(len(lengths))
  sizes = lengths[order, 1].astype(np.int64)
  # If few targets fit, trying all would take a time that grows with the square of their number.
  least = np.array([sizes[i : i + _BLOCK].min() for i in range(0, len(sizes), _BLOCK)], np.int64)
  rooms = (max_length - 2 * lengths[order, 0].astype(np.int64) - sizes).tolist()
  ordered = prompts[order].tolist()
  found = np.full(len(lengths), -1, np.int64)
  for place, (prompt, room) in enumerate(zip(ordered, rooms, strict=True)):
    following = itertools.chain(
      _find_fitting(sizes, least, place + 1, len(order), room),
      _find_fitting(sizes, least, 0, place, room),
    )
    found[order[place]] = next((order[k] for k in following if ordered[k] != prompt), -1)
  return found


def _find_fitting(
  sizes: np.ndarray, least: np.ndarray, begin: int, end: int, room: int
) -> Iterator[int]:
  """Yield the indices in [begin, end) whose size is at most `room`, in ascending order.

  Args:
    sizes: i64[N].
    least: the smallest size of each block of `_BLOCK`.
    begin, end: range of indices.
    room: largest size.
  """
  first = begin // _BLOCK
  for block in np.flatnonzero(least[first : -(-end // _BLOCK)] <= room).tolist():
    low = max((first + block) * _BLOCK, begin)
    high = min((first + block + 1) * _BLOCK, end)
    yield from (np.flatnonzero(sizes[low:high] <= room) + low).tolist()


def _make_set(units: UnitTable, dropped: collections.Counter[str], max_length: int) -> UnitSet:
  """Return the units with their counts.

  Raises:
    UserError: if there are none.
  """
  counts = {
    'rows': len(units) + dropped.total(),
    'kept': len(units),
    'dropped': {reason: n for reason, n in sorted(dropped.items()) if n},
  }
  if not len(units):
    raise UserError(
      f"No preference remains of {counts['rows']} rows; dropped: {counts['dropped']}. 'truncated' "
      'means that a text was cut off at a length limit (raise it, or set drop_truncated=False), '
      f"and 'too_long' that both sequences together have more than max_length={max_length} tokens."
    )
  return UnitSet(units, counts)
