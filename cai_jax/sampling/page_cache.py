"""The paged cache of a model in memory: its arrays on the device, and which slot owns which page.

`cai_jax.model.cache` explains pages, blocks and tables, and defines the axis letters.
"""

import collections
import math
from collections.abc import Hashable, Sequence

import numpy as np

from cai_jax.model.attention.cached import CACHED
from cai_jax.model.cache import Cache, RowTable, windows_of
from cai_jax.model.lm import LM
from cai_jax.runtime.mesh import batch_shards
from cai_jax.sampling import caches
from cai_jax.sampling.config import EngineConfig
from cai_jax.sampling.pages import PagePool

MIN_BLOCK, MAX_BLOCKS = 48, 12  # pages of a block at least, and blocks of a pool at most


class PageCache:
  """The pages of all slots of a model, in one pool for each window that layers have.

  A slot gets pages as its context grows. If pages run short, slots wait for those that chains give
  back when they end. The chain that started first can always have the pages that it may still
  need, so one chain makes progress.

  Numbers of tokens count a slot's whole context. The tokens of its shared prefix have no pages.

  Args:
    lm: the model.
    slots: number of slots.
    length: maximum number of tokens of a slot without its shared prefix.
    share: pages that there are, as a share of what all slots need at their maximum.
    config: sizes of the compiled programs.
    attention: name of the attention to the cache.

  Attributes:
    pools: for each window of `windows_of`, its pool.
    base: i32[slots], number of tokens of each slot's shared prefix.
    started: i64[slots], the order in which the chains of the slots started; -1 for an idle slot.
  """

  def __init__(
    self, lm: LM, slots: int, length: int, share: float, config: EngineConfig, attention: str
  ):
    self._lm, self._config, self._attention = lm, config, attention
    self._groups = batch_shards(lm.mesh)  # of slots; each group is on devices of its own
    self._windows = windows_of(lm.config)
    self._group = np.arange(slots) * self._groups // slots
    self.base = np.zeros(slots, np.int32)
    self.started = np.full(slots, -1)
    self._blocks: list[list[caches.Block]] = [[] for _ in self._windows]
    self.pools = [self._make_pool(i, length, share) for i in range(len(self._windows))]

  def _make_pool(self, index: int, length: int, share: float) -> PagePool:
    """Return the pool of the layers with one window."""
    window, config, slots = self._windows[index], self._config, len(self.base)
    page_tokens = config.page_tokens if window != 0 else length  # a state holds all of them
    row_pages = caches.pages_of(length, window, config.slack, page_tokens)
    capacity = max(math.ceil(share * slots // self._groups * row_pages), row_pages)
    most = CACHED[self._attention].max_blocks or MAX_BLOCKS if window != 0 else 1
    block_pages = min(max(MIN_BLOCK, -(-capacity // most)), capacity)

    def allocate():
      pages = block_pages * self._groups
      self._blocks[index].append(
        caches.allocate_block(self._lm, window, pages, page_tokens, self._attention)
      )

    sizes = row_pages, block_pages, -(-capacity // block_pages), page_tokens
    return PagePool(slots, self._groups, *sizes, window or None, allocate)

  @property
  def shapes(self) -> Hashable:
    """What the shapes of the arrays and tables depend on, besides the model and the config."""
    return tuple((pool.table.shape, pool.block_pages, pool.max_blocks) for pool in self.pools)

  def group_of(self, slot: int) -> int:
    """Return the index of the group of slots that a slot belongs to."""
    return int(self._group[slot])

  def clear(self, slot: int) -> None:
    """Take back all pages of a slot, which has no chain any more."""
    self.started[slot], self.base[slot] = -1, 0
    for pool in self.pools:
      pool.shorten(slot, 0)

  def keep(self, slot: int, base: int, tokens: int) -> None:
    """Keep only the pages with a slot's first tokens.

    Args:
      slot: index of the slot.
      base: number of tokens of its shared prefix.
      tokens: number of tokens to keep.
    """
    self.base[slot] = base
    for pool in self.pools:
      pool.shorten(slot, tokens - base)

  def forget(self, slot: int, tokens: int) -> None:
    """Take back the pages that have left the windows of a slot with this many tokens."""
    for pool in self.pools:
      pool.forget(slot, tokens - int(self.base[slot]), self._config.undo)

  def extend(self, slot: int, tokens: int) -> bool:
    """Give a slot pages for this many tokens; return False if it has to wait for them.

    The chain that started first may take any page. The others leave as many as it may still need.
    """
    tokens -= int(self.base[slot])
    if not any(pool.missing(slot, tokens) for pool in self.pools):
      return True
    holders = np.flatnonzero(self.started >= 0)
    holders = holders[self._group[holders] == self._group[slot]]
    first = holders[self.started[holders].argmin()]
    for pool in self.pools:
      needed = pool.missing(slot, tokens)
      reserved = pool.table.shape[1] - int(pool.count[first]) if slot != first else 0
      if needed and pool.free_pages(slot) < needed + reserved:
        return False
    for pool in self.pools:
      pool.extend(slot, tokens)
    return True

  def compact(self) -> None:
    """Move pages to fewer blocks if possible, because a step reads all pages of the blocks in use.

    It moves none on accelerators, nor with several batch shards, which have blocks in common.
    """
    if self._groups > 1 or not caches.on_cpu(self._lm.mesh):
      return
    for pool, blocks in zip(self.pools, self._blocks, strict=True):
      size, by_block = pool.block_pages, collections.defaultdict(list)
      for page, new in pool.compact().items():
        by_block[new // size, page // size].append((new % size, page % size))
      for (target, source), moves in by_block.items():
        blocks[target] = caches.move_pages(blocks[target], blocks[source], moves)

  def used_blocks(self) -> tuple[int, ...]:
    """Return, for each pool, the number of blocks up to the last page in use."""
    return tuple(pool.used_blocks() for pool in self.pools)

  def take(self, blocks: Sequence[int]) -> Cache:
    """Return the first blocks of each layer; the caller donates them to a program.

    Args:
      blocks: number of blocks of each pool, which are allocated if they do not exist yet.
    """
    for pool, count in zip(self.pools, blocks, strict=True):
      pool.grow(count)
    taken = [self._blocks[i][:count] for i, count in enumerate(blocks)]
    layers = [iter(zip(*pool, strict=True)) for pool in taken]
    config = self._lm.config
    windows = [self._windows.index(config.window(i)) for i in range(config.num_layers)]
    return tuple(next(layers[window]) for window in windows)

  def put(self, cache: Cache) -> None:
    """Store the blocks that a program returned."""
    for index, window in enumerate(self._windows):
      own = [layer for i, layer in enumerate(cache) if self._lm.config.window(i) == window]
      self._blocks[index][: len(own[0])] = list(zip(*own, strict=True))

  def row_tables(self, rows: np.ndarray, blocks: Sequence[int]) -> tuple[RowTable, ...]:
    """Return, for each pool, where rows are in its first blocks.

    Args:
      rows: i32[G·D], the slots; -1 is padding.
      blocks: number of blocks of each pool.
    """
    return tuple(self._row_table(p, rows, n) for p, n in zip(self.pools, blocks, strict=True))

  def _row_table(self, pool: PagePool, rows: np.ndarray, blocks: int) -> RowTable:
    """Return where rows are in the first blocks of a pool."""
    groups, page, total = self._groups, pool.page_tokens, blocks * pool.block_pages
    pages = pool.select(rows, total).reshape(groups, -1, pool.table.shape[1])
    first = np.where(rows >= 0, self.base[rows] + pool.first[rows] * page, 0)
    first = first.astype(np.int32).reshape(groups, -1)
    owner = np.full((groups, total + 1), -1, np.int32)  # the last one takes the missing pages
    start = np.zeros((groups, total + 1), np.int32)
    for group in range(groups):
      owner[group, pages[group]] = np.arange(pages.shape[1])[:, None]
      start[group, pages[group]] = first[group][:, None] + page * np.arange(pages.shape[2])
    owner, start = owner[:, :total].copy(), start[:, :total].copy()
    return RowTable(owner, start, pages, first)  # type: ignore[arg-type]  # numpy arrays
