"""Chunks of prefill: the next tokens of several slots, packed next to each other.

`cai_jax.model.cache` explains pieces and their tables, and defines the axis letters.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cai_jax.model.cache import Pieces, PieceTable
from cai_jax.sampling.page_cache import PageCache
from cai_jax.sampling.step_arrays import Chunk

NO_PAGE = 2**30  # the page of padding, which is not written
MIN_PIECES = 16


class Segment(NamedTuple):
  """Consecutive tokens to append to one slot's cache.

  Attributes:
    slot: index of the slot.
    tokens: token ids.
    start: position of the first token.
    prefix: index of the shared prefix that the slot's context starts with; -1 if none.
  """

  slot: int
  tokens: list[int]
  start: int
  prefix: int


def piece_count(size: int, width: int) -> int:
  """Return the largest number of pieces of a chunk.

  It is 1.5 times the number of full pieces, because the last piece of a slot is rarely full.

  Args:
    size: T, number of tokens of the chunk.
    width: C, number of tokens of a piece.
  """
  return max(MIN_PIECES, -(-3 * size // (2 * width)))


def pack_chunk(
  cache: PageCache, groups: Sequence[Sequence[Segment]], size: int, width: int
) -> Chunk:
  """Pack segments of slots into a chunk of `size` tokens for each group.

  Args:
    cache: where the slots have pages for all of their tokens.
    groups: the segments of each group of slots in order, at most one for each slot.
    size: T, number of tokens of the chunk.
    width: C, number of tokens of a piece.
  """
  count, num_pieces = len(groups), piece_count(size, width)
  tokens, prefix = np.zeros((count, size), np.int32), np.full((count, size), -1, np.int32)
  positions = np.full((count, size), -1, np.int32)
  starts, numbers = np.zeros((count, num_pieces), np.int32), np.zeros(count, np.int32)
  tables = [_empty_table(count, size, num_pieces, pool.table.shape[1]) for pool in cache.pools]
  for group, segments in enumerate(groups):
    end = 0
    for segment in segments:
      begin, end = end, end + len(segment.tokens)
      place = np.arange(end - begin)
      tokens[group, begin:end] = segment.tokens
      positions[group, begin:end] = segment.start + place
      prefix[group, begin:end] = segment.prefix
      base = int(cache.base[segment.slot])
      number = segment.start - base + place  # of each token among those that have pages
      pieces = numbers[group] + np.arange(-(-len(place) // width))
      numbers[group] += len(pieces)
      starts[group, pieces] = begin + place[::width]
      last = number[np.minimum(place[::width] + width, len(place)) - 1]
      for pool, table in zip(cache.pools, tables, strict=True):
        own, first = pool.table[segment.slot], int(pool.first[segment.slot])
        page = pool.page_tokens
        table.pages[group, pieces] = np.maximum(own, 0)
        table.num_pages[group, pieces] = last // page - first + 1
        table.first[group, pieces] = base + first * page
        table.page[group, begin:end] = own[number // page - first]
        table.offset[group, begin:end] = number % page
  split = Pieces(starts, numbers, tuple(tables))  # type: ignore[arg-type]  # numpy arrays
  return Chunk(tokens, positions, prefix, split)


def _empty_table(groups: int, size: int, pieces: int, pages: int) -> PieceTable:
  """Return the table, of NumPy arrays, of a chunk without tokens."""
  i32 = lambda *shape: np.zeros((groups, *shape), np.int32)  # noqa: E731
  page = np.full((groups, size), NO_PAGE, np.int32)
  return PieceTable(page, i32(size), i32(pieces, pages), i32(pieces), i32(pieces))  # type: ignore[arg-type]
