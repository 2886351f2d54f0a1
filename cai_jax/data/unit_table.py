"""Examples and units as arrays, in memory or mapped from files, in a few bytes besides the tokens.

A table takes 4 bytes for each token, 8 for each segment and 8 besides its letters for each id. If
it is mapped from files, the operating system reads pages as they are needed and can give them back.
"""

import itertools
import json
import pathlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cai_jax.data.ragged import Ragged
from cai_jax.data.units import (
  ARRAYS,
  LAST_SEGMENTS,
  RANGES,
  SEGMENTS,
  Example,
  Unit,
  add_values,
  as_unit,
  check_each,
  check_units,
  choose_items,
  item_ids,
  segment_lengths,
  share_prompt,
  share_prompts,
  shared_counts,
  unit_lengths,
)
from cai_jax.runtime.files import replacing

_TOKEN, _LEARNED = np.int32(2**31 - 1), np.int32(-(2**31))  # bits of a stored token
_BLOCK = 4096  # units whose tokens are read together


class Part(NamedTuple):
  """The arrays of some examples or units.

  Attributes:
    segments: i32, the token ids of each segment. Tokens to learn also have the sign bit.
    ids: u8, the UTF-8 letters of each unit's id.
    values: by name, f64[N,S]: a number for each segment of each unit.
    marks: by name, bool[N]: what else is known of each unit. Batches do not have it.
    counts: how often each reason dropped a row.
  """

  segments: Ragged
  ids: Ragged
  values: Mapping[str, np.ndarray]
  marks: Mapping[str, np.ndarray]
  counts: Mapping[str, int]

  @property
  def size(self) -> int:
    """Number of examples or units."""
    return self.ids.size


def make_part(
  items: Iterable[Example | Unit],
  marks: Mapping[str, Sequence[bool]] | None = None,
  counts: Mapping[str, int] | None = None,
) -> Part:
  """Return the arrays of examples or units.

  Args:
    items: examples, or units with equally many segments and the same values. They are read once.
    marks: what else is known of each item, by name.
    counts: how often each reason dropped a row.
  """
  tokens, lengths, names = [np.zeros(0, np.int32)], [], []
  values: dict[str, list[tuple[float, ...]]] = {}
  for item in items:
    unit = as_unit(item)
    for segment in unit.segments:
      lengths.append(len(segment.tokens))
      tokens.append(np.where(segment.loss_mask, segment.tokens | _LEARNED, segment.tokens))
    names.append(unit.id.encode())
    for name, numbers in unit.values.items():
      values.setdefault(name, []).append(numbers)
  letters = np.frombuffer(b''.join(names), np.uint8)
  return Part(
    Ragged.of_lengths(np.concatenate(tokens, dtype=np.int32), lengths),
    Ragged.of_lengths(letters, list(map(len, names))),
    {name: np.array(numbers, np.float64) for name, numbers in values.items()},
    {name: np.array(flags, bool) for name, flags in (marks or {}).items()},
    dict(counts or {}),
  )


def save_part(path: pathlib.Path, part: Part) -> None:
  """Write a part atomically, as a safetensors file.

  Args:
    path: the file; its folder exists.
    part: the arrays.
  """
  arrays = {'tokens': part.segments.values, 'segments': part.segments.offsets}
  arrays |= {'letters': part.ids.values, 'ids': part.ids.offsets}
  arrays |= {f'values/{name}': x for name, x in part.values.items()}
  arrays |= {f'marks/{name}': x for name, x in part.marks.items()}
  checksums = {name: zlib.crc32(np.ascontiguousarray(x).data) for name, x in arrays.items()}
  facts = {'counts': dict(part.counts), 'crc32': checksums}
  with replacing(path) as temporary:
    # One entry, because safetensors writes several in any order.
    save_file(arrays, temporary, metadata={'facts': json.dumps(facts)})


def is_whole(path: pathlib.Path) -> bool:
  """Return whether a file is as `save_part` wrote it; this reads all of it.

  Args:
    path: the file.
  """
  try:
    with safe_open(path, 'np') as file:
      checksums = json.loads(file.metadata()['facts'])['crc32']
      return {*checksums} == {*file.keys()} and all(
        zlib.crc32(np.ascontiguousarray(file.get_tensor(name)).data) == checksum
        for name, checksum in checksums.items()
      )
  except (SafetensorError, KeyError, TypeError, ValueError):
    return False


def map_part(path: pathlib.Path) -> Part:
  """Return the arrays of a file that `save_part` wrote, without reading them.

  Args:
    path: the file, which is whole; see `is_whole`.
  """
  with open(path, 'rb') as file:
    size = int.from_bytes(file.read(8), 'little')
    header: dict[str, Any] = json.loads(file.read(size))
  counts = json.loads(header.pop('__metadata__')['facts'])['counts']
  stored = np.memmap(path, np.uint8, 'r', offset=0)
  kinds = {'I32': np.int32, 'I64': np.int64, 'U8': np.uint8, 'F64': np.float64, 'BOOL': np.bool_}

  def view(entry: dict[str, Any]) -> np.ndarray:
    begin, end = (8 + size + place for place in entry['data_offsets'])
    return np.asarray(stored[begin:end]).view(kinds[entry['dtype']]).reshape(entry['shape'])

  arrays = {name: view(entry) for name, entry in header.items()}

  def named(kind: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(kind): x for name, x in arrays.items() if name.startswith(kind)}

  segments = Ragged(arrays['tokens'], arrays['segments'])
  ids = Ragged(arrays['letters'], arrays['ids'])
  return Part(segments, ids, named('values/'), named('marks/'), counts)


class UnitTable(Sequence[Any]):
  """A sequence of examples or of units, whose arrays are made on access.

  Args:
    parts: their arrays, at least one.
    kind: what they are, a key of `SEGMENTS`. Those of the kind 'sequence' are examples.
  """

  def __init__(self, parts: Sequence[Part], kind: str):
    self._parts, self._width, self._kind = parts, SEGMENTS[kind], kind
    self._pieces: np.ndarray | None = None
    self._starts = np.cumsum([0] + [part.size for part in parts])
    self._order = np.arange(self._starts[-1])
    lengths = np.concatenate([part.segments.lengths for part in parts])
    self._lengths = lengths.astype(np.int32).reshape(-1, self._width)
    self._values = {
      name: np.concatenate([part.values[name] for part in parts if part.size])
      for name in next((part.values for part in parts if part.size), {})
    }
    self._shared = np.zeros(len(self), np.int32)

  def __len__(self) -> int:
    return len(self._order)

  def __getitem__(self, index: int) -> Any:  # type: ignore[override]  # no slices
    if not -len(self) <= index < len(self):
      raise IndexError(index)
    number = int(self._order[index])
    part, i = self._find(number)
    name = part.ids.row(i).tobytes().decode()
    segments = tuple(Example(*self.decode(row), name) for row in self._segments(number))
    if self._kind == 'sequence':
      return segments[0]
    values = {name: tuple(x[number].tolist()) for name, x in self._values.items()}
    return Unit(segments, values, name, int(self._shared[number]))

  def _segments(self, number: int) -> Iterator[np.ndarray]:
    """Yield the segments of an item as stored, i32[T] each."""
    if self._pieces is None:
      part, i = self._find(number)
      yield from (part.segments.row(i * self._width + k) for k in range(self._width))
      return
    for segment in self._pieces[number]:
      yield self._gather(segment).values

  def _gather(self, rows: np.ndarray) -> Ragged:
    """Return rows of the segments of all parts, given by their numbers i64[M]."""
    owners = np.searchsorted(self._starts * self._width, rows, side='right') - 1
    if len(rows) and (owners == owners[0]).all():
      begin = self._starts[owners[0]] * self._width
      return self._parts[owners[0]].segments.take(rows - begin)
    pieces, order = [], np.argsort(owners, kind='stable')
    for owner in np.unique(owners):
      here = rows[owners == owner] - self._starts[owner] * self._width
      pieces.append(self._parts[owner].segments.take(here))
    return Ragged.join(pieces).take(np.argsort(order))

  def _find(self, number: int) -> tuple[Part, int]:
    """Return the part of an item, and its index there."""
    k = int(np.searchsorted(self._starts, number, side='right')) - 1
    return self._parts[k], number - int(self._starts[k])

  def take(self, order: np.ndarray) -> 'UnitTable':
    """Return chosen items in a given order, which share the arrays of this table.

    Args:
      order: indices of items, i64[M].
    """
    taken = self._copy()
    taken._order = self._order[order]
    return taken

  def with_values(self, name: str, numbers: np.ndarray) -> 'UnitTable':
    """Return these units with another value.

    Args:
      name: the name of the value.
      numbers: f64[N,S], a number for each segment of each of these units.
    """
    column = np.full(self._lengths.shape, np.nan)
    column[self._order] = numbers
    table = self._copy()
    table._values = {**self._values, name: column}
    return table

  def without_value(self, name: str) -> 'UnitTable':
    """Return these units without one of their values.

    Args:
      name: the name of the value.
    """
    table = self._copy()
    table._values = {key: column for key, column in self._values.items() if key != name}
    return table

  def join_pieces(self, pieces: np.ndarray) -> 'UnitTable':
    """Return units of this table's ids and values, whose segments are joined from its segments.

    So tokens that several units have are stored once.

    Args:
      pieces: i64[N,S,P], for each segment of each unit the numbers of the segments that it consists
        of. Unit i has the segments i · S + k, k < S.
    """
    table = self._copy()
    table._pieces = pieces
    table._lengths = self._lengths.reshape(-1)[pieces].sum(axis=2, dtype=np.int32)
    return table

  def share_prompts(self) -> 'UnitTable':
    """Return these units, whose segments share their prompt; see `share_prompt`."""
    table = self._copy()
    table._shared = self._shared.copy()
    for number, unit in zip(self._order, self, strict=True):
      table._shared[number] = share_prompt(unit).shared
    return table

  def _copy(self) -> 'UnitTable':
    table = object.__new__(UnitTable)
    table.__dict__.update(self.__dict__)
    return table

  @property
  def ids(self) -> list[str]:
    """The id of each item."""
    found = (self._find(number) for number in self._order.tolist())
    return [part.ids.row(i).tobytes().decode() for part, i in found]

  def blocks(self) -> Iterator[tuple[np.ndarray, Ragged]]:
    """Yield the indices of consecutive items, and the segments of these as stored; see `Part`."""
    for begin in range(0, len(self), _BLOCK):
      numbers = self._order[begin : begin + _BLOCK]
      if self._pieces is None:
        segments = self._gather((numbers[:, None] * self._width + np.arange(self._width)).ravel())
      else:
        chosen = self._pieces[numbers]
        values, offsets = self._gather(chosen.ravel())
        segments = Ragged(values, offsets[:: chosen.shape[2]])
      yield np.arange(begin, begin + len(numbers)), segments

  @staticmethod
  def decode(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens i32[T] and the loss mask bool[T] of stored tokens i32[T]."""
    return stored & _TOKEN, stored < 0

  def values(self) -> dict[str, np.ndarray]:
    """Return the values of these items by name, f64[N,S] each."""
    return {name: x[self._order] for name, x in self._values.items()}

  def segment_lengths(self) -> np.ndarray:
    """Return the number of tokens of each segment, i32[N,S]."""
    return self._lengths[self._order]

  def shared(self) -> np.ndarray:
    """Return how many tokens the segments of each item share, i32[N]."""
    return self._shared[self._order]


@unit_lengths.register
def _(items: UnitTable) -> np.ndarray:
  lengths, shared = items.segment_lengths(), items.shared()
  return lengths.sum(axis=1, dtype=np.int64) - shared * (lengths.shape[1] - 1)


@segment_lengths.register
def _(items: UnitTable) -> Ragged:
  lengths = items.segment_lengths()
  return Ragged.of_lengths(lengths.reshape(-1).astype(np.int64), np.full(*lengths.shape))


@shared_counts.register
def _(items: UnitTable) -> np.ndarray:
  return items.shared()


@item_ids.register
def _(items: UnitTable) -> list[str]:
  return items.ids


@choose_items.register
def _(items: UnitTable, indices: Sequence[int]) -> UnitTable:
  return items.take(np.asarray(indices, np.int64))


@check_units.register
def _(
  items: UnitTable, kind: str, needed: Sequence[str] = (), names: Iterable[str] | None = None
) -> None:
  """Check all units at once, and each on its own only to name the one with a fault."""
  if not _are_valid(items, kind, needed, names):
    check_each(items, kind, needed, names)


def _are_valid(
  items: UnitTable, kind: str, needed: Sequence[str], names: Iterable[str] | None
) -> bool:
  """Return whether `check_each` would find no fault. It may be False where there is none."""
  values = items.values()
  if not len(items) or items.segment_lengths().shape[1] != SEGMENTS[kind]:
    return False
  if {*values} & {*ARRAYS, LAST_SEGMENTS}:
    return False
  if not {*needed} <= {*values} or (names is not None and {*names} != {*values}):
    return False
  for name, numbers in values.items():
    least, most = RANGES.get(name, (-np.inf, np.inf))
    if not (np.isfinite(numbers) & (least <= numbers) & (numbers <= most)).all():
      return False
  if kind == 'sequence':
    return True
  for _, segments in items.blocks():
    learned = np.cumsum(np.append(0, segments.values < 0))
    begins, ends = segments.offsets[:-1], segments.offsets[1:]
    if (begins == ends).any() or (learned[ends] == learned[begins + 1]).any():
      return False
  return True


@share_prompts.register
def _(units: UnitTable) -> UnitTable:
  return units.share_prompts()


@add_values.register
def _(units: UnitTable, name: str, numbers: Sequence[Sequence[float]]) -> UnitTable:
  return units.with_values(name, np.array(numbers, np.float64))


def stack_units(units: Iterable[Unit], kind: str) -> UnitTable:
  """Return units as a table in memory, without keeping all of them as objects.

  Args:
    units: units with the same values. They are read once.
    kind: a key of `SEGMENTS`.
  """
  remaining = iter(units)
  blocks = iter(lambda: tuple(itertools.islice(remaining, _BLOCK)), ())
  return UnitTable([*map(make_part, blocks)] or [make_part(())], kind)
