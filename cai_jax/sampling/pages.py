"""The pages of a pool that each slot owns, on the host; see `cai_jax.model.cache`."""

import heapq
import math
from collections.abc import Callable, Sequence

import numpy as np

FULL = 0.85  # how full blocks are at most after pages have moved; contexts grow into the rest


class PagePool:
  """The pages that slots own in the layers with one window.

  Slots are split into equal groups, one for each batch shard of the mesh, and a slot's pages are on
  its shard. Free pages with low numbers are given away first, so that the pages in use are in few
  blocks.

  Args:
    slots: number of slots.
    groups: number of groups.
    row_pages: N, the largest number of pages of a slot.
    block_pages: number of pages of a block in each group.
    max_blocks: the largest number of blocks.
    page_tokens: number of tokens of a page.
    window: the window of the layers; None means no limit.
    allocate: called before the pool gets another block.

  Attributes:
    table: i32[slots,N], the pages of each slot in order; -1 marks the end.
    count: i32[slots], number of pages of each slot.
    first: i32[slots], how many pages before those the slot has given back (windowed layers only).
    blocks: number of blocks.
    block_sizes: the numbers of blocks that programs are compiled for, in ascending order.
  """

  def __init__(
    self,
    slots: int,
    groups: int,
    row_pages: int,
    block_pages: int,
    max_blocks: int,
    page_tokens: int,
    window: int | None,
    allocate: Callable[[], None],
  ):
    self.window, self.block_pages, self.max_blocks = window, block_pages, max_blocks
    self.block_sizes = _block_sizes(max_blocks)
    self.page_tokens = page_tokens
    self.table = np.full((slots, row_pages), -1, np.int32)
    self.count = np.zeros(slots, np.int32)
    self.first = np.zeros(slots, np.int32)
    self.blocks = 0
    self._allocate = allocate
    self._group = np.arange(slots) * groups // slots
    self._free: list[list[int]] = [[] for _ in range(groups)]

  def free_pages(self, slot: int) -> int:
    """Return the number of pages that the slot's group could still give away."""
    unallocated = (self.max_blocks - self.blocks) * self.block_pages
    return len(self._free[self._group[slot]]) + unallocated

  def missing(self, slot: int, tokens: int) -> int:
    """Return how many more pages a slot needs in order to hold this many tokens."""
    return max(-(-tokens // self.page_tokens) - int(self.first[slot]) - int(self.count[slot]), 0)

  def extend(self, slot: int, tokens: int) -> None:
    """Give a slot pages for this many tokens. The caller knows that there are enough."""
    free = self._free[self._group[slot]]
    for _ in range(self.missing(slot, tokens)):
      if not free:
        self.grow(self.blocks + 1)
      self.table[slot, self.count[slot]] = heapq.heappop(free)
      self.count[slot] += 1

  def grow(self, blocks: int) -> None:
    """Allocate blocks until there are so many."""
    while self.blocks < blocks:
      self._allocate()
      start = self.blocks * self.block_pages
      for free in self._free:
        for page in range(start, start + self.block_pages):
          heapq.heappush(free, page)
      self.blocks += 1

  def shorten(self, slot: int, tokens: int) -> None:
    """Take back the pages of a slot that hold no token before the given number."""
    keep = max(-(-tokens // self.page_tokens) - int(self.first[slot]), 0)
    for index in range(keep, self.count[slot]):
      heapq.heappush(self._free[self._group[slot]], int(self.table[slot, index]))
    self.table[slot, keep:] = -1
    self.count[slot] = min(self.count[slot], keep)
    if not self.count[slot]:
      self.first[slot] = 0

  def forget(self, slot: int, tokens: int, slack: int) -> None:
    """Take back the pages that a slot with this many tokens has no use for any more.

    Args:
      slot: index of the slot.
      tokens: number of tokens in the slot's cache.
      slack: number of tokens to keep beyond the window.
    """
    if self.window is None:
      return
    unused = max(tokens - self.window - slack, 0) // self.page_tokens - int(self.first[slot])
    unused = min(unused, int(self.count[slot]))
    if unused <= 0:
      return
    for page in self.table[slot, :unused]:
      heapq.heappush(self._free[self._group[slot]], int(page))
    self.table[slot] = np.concatenate([self.table[slot, unused:], np.full(unused, -1, np.int32)])
    self.count[slot] -= unused
    self.first[slot] += unused

  def used_blocks(self) -> int:
    """Return the number of blocks up to the last page in use."""
    return max(int(self.table.max()) // self.block_pages + 1, 1)

  def compact(self) -> dict[int, int]:
    """Move pages in use to lower numbers if this saves a block; the caller moves their contents.

    Returns:
      The new number of each page that moves. The pool has a single group.
    """
    assert len(self._free) == 1
    target = math.ceil(self.count.sum() / (FULL * self.block_pages))
    smaller = [size for size in self.block_sizes if size < self.used_blocks()]
    if not smaller or target > smaller[-1]:
      return {}
    limit, moves = target * self.block_pages, {}
    for slot, index in np.argwhere(self.table >= limit):
      page = int(self.table[slot, index])
      self.table[slot, index] = moves[page] = heapq.heappop(self._free[0])
    for page in moves:
      heapq.heappush(self._free[0], page)
    return moves

  def select(self, slots: Sequence[int] | np.ndarray, absent: int) -> np.ndarray:
    """Return the pages i32[n,N] of some slots, with `absent` in place of missing pages.

    Args:
      slots: n indices of slots; -1 means a slot without pages.
      absent: the value of missing pages.
    """
    index = np.asarray(slots)
    pages = np.where((index >= 0)[:, None], self.table[index], -1)
    return np.where(pages < 0, absent, pages).astype(np.int32)


def _block_sizes(most: int) -> tuple[int, ...]:
  """Return numbers of blocks that grow by half, and by one below four.

  Args:
    most: the largest number.
  """
  sizes = [1]
  while sizes[-1] < most:
    sizes.append(min(max(sizes[-1] + 1, 3 * sizes[-1] // 2), most))
  return tuple(sizes)
