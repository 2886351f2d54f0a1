"""Units of training from preferences: token ids with a loss mask for each response."""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from cai_jax.data.preferences.comparisons import Comparison, JudgedResponse
from cai_jax.data.preferences.forms import digest64
from cai_jax.data.unit_table import UnitTable, stack_units
from cai_jax.data.units import Example, Unit
from cai_jax.dialogue import Dialogue
from cai_jax.runtime.errors import UserError

_BLOCK = 1024  # targets that are searched together


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

  Raises:
    UserError: if no comparison remains, or one has no margin although `margins` is set.
  """

  def render(pair: Comparison) -> tuple[Example, ...]:
    context = _context(dialogue, pair.prompt)
    return tuple(_join(context, _target(dialogue, text), pair.id) for text in pair.texts)

  return render_comparisons(comparisons, render, max_length, drop_truncated, margins)


def render_comparisons(
  comparisons: Iterable[Comparison],
  render: Callable[[Comparison], tuple[Example, ...]],
  max_length: int,
  drop_truncated: bool,
  margins: bool,
) -> UnitSet:
  """Return a unit of the two segments of each comparison that `render` returns.

  The other arguments and the errors are those of `build_comparison_units`.

  Args:
    comparisons: the comparisons; they are read once.
    render: returns the segments of a comparison.
    max_length: maximum number of tokens of a unit.
    drop_truncated: whether to drop comparisons with a text that was cut off.
    margins: whether the units have margins.
  """
  dropped: collections.Counter[str] = collections.Counter()
  units = _render_each(comparisons, render, max_length, drop_truncated, margins, dropped)
  return _make_set(stack_units(units, 'comparison'), dropped, max_length)


def _render_each(
  comparisons: Iterable[Comparison],
  render: Callable[[Comparison], tuple[Example, ...]],
  max_length: int,
  drop_truncated: bool,
  margins: bool,
  dropped: collections.Counter[str],
) -> Iterator[Unit]:
  """Yield the unit of each comparison, and count in `dropped` why others have none."""
  for pair in comparisons:
    if margins and pair.margin is None:
      raise UserError(
        f'The comparison {pair.id!r} has no margin. Give each row `margin`, or `score_chosen` and '
        '`score_rejected`, or train without a margin.'
      )
    if drop_truncated and any(pair.truncated):
      dropped['truncated'] += 1
      continue
    values = {'probability': (pair.probability, 1 - pair.probability)}
    if margins and pair.margin is not None:
      values['margin'] = (pair.margin, -pair.margin)
    unit = Unit(render(pair), values, pair.id)
    if unit.length > max_length:
      dropped['too_long'] += 1
    else:
      yield unit


class _Tokens(NamedTuple):
  """A judged response as token ids."""

  id: str
  context: np.ndarray  # i32[C]
  target: np.ndarray  # i32[T]
  desirable: bool
  prompt: int  # hash


def build_judged_units(
  responses: Iterable[JudgedResponse],
  dialogue: Dialogue,
  *,
  max_length: int = 1024,
  drop_truncated: bool = True,
  seed: int = 0,
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

  Raises:
    UserError: if no response remains, or all of them have the same prompt.
  """
  kept = []
  dropped: collections.Counter[str] = collections.Counter()
  for judged in responses:
    if drop_truncated and judged.truncated:
      dropped['truncated'] += 1
      continue
    context = _context(dialogue, judged.prompt)
    target = _target(dialogue, judged.response)
    prompt = digest64(list(judged.prompt))
    kept.append(_Tokens(judged.id, context, target, judged.desirable, prompt))
  if kept and len({entry.prompt for entry in kept}) == 1:
    raise UserError(
      f'All {len(kept)} judged responses answer the same prompt, so none can be paired with a '
      'response to another prompt. Give responses to at least two prompts.'
    )
  others = _find_mismatches(kept, max_length, seed)

  def pair_up() -> Iterator[Unit]:
    for entry, other in zip(kept, others, strict=True):
      if other is None:
        dropped['too_long'] += 1
        continue
      segments = tuple(_join(entry.context, target, entry.id) for target in (entry.target, other))
      yield Unit(segments, {'desirable': (float(entry.desirable), 0.0)}, entry.id)

  return _make_set(stack_units(pair_up(), 'judged'), dropped, max_length)


def _find_mismatches(
  entries: Sequence[_Tokens], max_length: int, seed: int
) -> list[np.ndarray | None]:
  """Return for each entry the target of another prompt, or None if there is none that fits."""
  order = np.random.default_rng([seed, 3]).permutation(len(entries)).tolist()
  sizes = np.array([len(entries[i].target) for i in order], np.int64)
  # If few targets fit, trying all would take a time that grows with the square of their number.
  least = np.array([sizes[i : i + _BLOCK].min() for i in range(0, len(sizes), _BLOCK)], np.int64)
  found: list[np.ndarray | None] = [None] * len(entries)
  for place, i in enumerate(order):
    entry = entries[i]
    room = max_length - 2 * len(entry.context) - len(entry.target)
    following = itertools.chain(
      _find_fitting(sizes, least, place + 1, len(order), room),
      _find_fitting(sizes, least, 0, place, room),
    )
    others = (entries[order[k]] for k in following)
    found[i] = next((o.target for o in others if o.prompt != entry.prompt), None)
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


def _context(dialogue: Dialogue, prompt: Sequence[dict[str, Any]]) -> np.ndarray:
  """Return the tokens before a response, i32[C]."""
  return np.asarray(dialogue.prompt(prompt), np.int32)


def _target(dialogue: Dialogue, text: str) -> np.ndarray:
  """Return the tokens of a response and the one that ends it, i32[T]."""
  return np.asarray(dialogue.reply(text), np.int32)


def _join(context: np.ndarray, target: np.ndarray, name: str) -> Example:
  """Return a segment, as `Dialogue.example` makes it: only the target is learned."""
  mask = np.arange(len(context) + len(target)) >= len(context)
  return Example(np.concatenate([context, target]), mask, name)


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
