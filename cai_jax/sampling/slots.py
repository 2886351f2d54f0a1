"""The host side of a model in memory: the contents of its slots, and what to compute next."""

import ctypes
import math
import time
from collections.abc import Sequence
from typing import NamedTuple, cast

import jax
import numpy as np

from cai_jax.model.attention.cached import CACHED
from cai_jax.model.cache import Cache, Pieces, PieceTable, RowTable, windows_of
from cai_jax.model.lm import LM
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import batch_shards
from cai_jax.sampling import caches, device
from cai_jax.sampling.config import AUTO, EngineConfig
from cai_jax.sampling.draft_choice import DraftChoice
from cai_jax.sampling.noise import SAMPLER
from cai_jax.sampling.pages import PagePool
from cai_jax.sampling.penalties import Penalties
from cai_jax.sampling.prefixes import common_length, match_prefix, prefix_capacity
from cai_jax.sampling.programs import Programs, Size, find_programs
from cai_jax.sampling.stats import COMPILATIONS, Stats
from cai_jax.sampling.types import Turn

NO_PAGE = 2**30  # the page of padding, which is not written
NEARLY_FULL = 0.8  # share of a chunk's tokens
MIN_PIECES = 16
MIN_BLOCK, MAX_BLOCKS = 64, 8  # pages of a block at least, and blocks of a pool at most
MAX_MIXED_WAIT = 2  # the same, if the step that prefills also decodes
MAX_WAIT = 8  # decode steps that a slot may wait to share a prefill chunk with other slots


class Segment(NamedTuple):
  """Consecutive tokens to append to one slot's cache.

  Attributes:
    slot: index of the slot.
    tokens: token ids.
    start: position of the first token.
  """

  slot: int
  tokens: list[int]
  start: int


class _Running(NamedTuple):
  """A burst on the device.

  Attributes:
    burst: its result.
    rows: i32[G·D], the slots of its rows; -1 is padding.
    before: the state of the rows at its start.
    size: size of the program.
    compiled: whether it was compiled for this burst.
    begin: `time.perf_counter()` of the dispatch.
  """

  burst: device.Burst
  rows: np.ndarray
  before: device.Slots
  size: Size
  compiled: bool
  begin: float


def piece_count(size: int, width: int) -> int:
  """Return the largest number of pieces of a chunk.

  It is 1.5 times the number of full pieces, because the last piece of a slot is rarely full.

  Args:
    size: T, number of tokens of the chunk.
    width: C, number of tokens of a piece.
  """
  return max(MIN_PIECES, -(-3 * size // (2 * width)))


class LocalModel:
  """The slots of one model: their caches on the device and their state on the host.

  Each slot serves one chain. `submit` queues a turn. Then steps (`dispatch`, then `collect`) bring
  the slot's cache up to the turn's context, and sample its reply.

  A slot gets pages of the cache as its context grows. If pages run short, slots wait for those that
  chains give back when they end. The chain that started first can always have the pages that it may
  still need, so one chain makes progress.

  Args:
    lm: the model.
    slots: number of slots.
    length: maximum number of tokens in a slot's cache.
    share: pages that there are, as a share of what all slots need at their maximum.
    prefixes: token ids of the shared prefixes, which the constructor prefills.
    config: sizes of the compiled programs.
    stats: counters that this model adds to.

  Attributes:
    attention: name of the attention to the cache.
    cached: for each slot, the context tokens that its cache holds, including those of its shared
      prefix.
    waiting: for each slot with a queued turn, the tokens that its cache must hold before decoding.
    step_seconds: seconds per decode step, measured on the last burst.

  Raises:
    UserError: if the mesh does not divide the number of slots or of key-value heads.
  """

  def __init__(
    self,
    lm: LM,
    slots: int,
    length: int,
    share: float,
    prefixes: Sequence[Sequence[int]],
    config: EngineConfig,
    stats: Stats,
  ):
    self.lm, self.config, self.stats = lm, config, stats
    caches.check_rows(lm, slots)
    _trim_heap()
    self._groups = batch_shards(lm.mesh)  # of slots; each group is on devices of its own
    self._mixed = config.mixes(slots // self._groups, lm)
    self._row_sizes = config.row_sizes(slots // self._groups, lm)
    self._chunk_sizes = config.chunk_sizes(slots, lm.mesh)
    self._width = config.piece_width(slots, lm.mesh)
    self._windows = windows_of(lm.config)
    self.attention = config.choose_attention(lm)
    self._blocks: list[list[caches.Block]] = [[] for _ in self._windows]
    self._pools = [self._make_pool(i, slots, length, share) for i in range(len(self._windows))]
    self._programs = self._find_programs(prefixes)
    self.slots = device.Slots.empty(slots)
    self._penalties: Penalties | None = None  # made for the first turn that uses any
    self._penalized = np.zeros(slots, bool)  # the slots whose turn uses any
    # Context and reply of each slot. Entries beyond the slot's position are undefined.
    self._text = np.zeros((slots, length + max(map(len, prefixes), default=0)), np.int32)
    # Where programs of other sizes give other bits, measured times must not choose between them.
    measured = config.draft_tokens == AUTO and self._mixed
    self._draft_choice = DraftChoice(self._row_sizes[0]) if measured else None
    self._length = length
    self.cached: list[list[int]] = [[] for _ in range(slots)]
    self._max_cached = [0] * slots  # the most tokens that a slot has cached since it started over
    self._base = np.zeros(slots, np.int32)  # tokens of each slot's shared prefix
    self._started = np.full(slots, -1)  # the order in which the chains of the slots started
    self.waiting: dict[int, list[int]] = {}
    self._waiting_since: dict[int, int] = {}  # slot → decode steps run when it began to wait
    self.prefixes = [list(prefix) for prefix in prefixes]
    capacity = prefix_capacity(prefixes)
    self.prefix_caches = tuple(
      device.prefill_prefix(lm, p, capacity, self._chunk_sizes[-1], self._width)
      for p in self.prefixes
    )
    stats.prefix_tokens += sum(map(len, prefixes))
    self._prefilled: jax.Array | None = None  # ready when the dispatched chunks are
    self._burst: _Running | None = None
    self.step_seconds = 0.0
    self._steps = self._occupied = 0  # decode steps, and active slots summed over them
    self._turns, self._new_tokens = 0, 0  # submitted turns, and the tokens to prefill for them

  def _make_pool(self, index: int, slots: int, length: int, share: float) -> PagePool:
    """Return the pool of the layers with one window."""
    window = self._windows[index]
    row_pages = caches.pages_of(length, window, self.config.slack, self.config.page_tokens)
    capacity = max(math.ceil(share * slots // self._groups * row_pages), row_pages)
    most = CACHED[self.attention].max_blocks or MAX_BLOCKS
    block_pages = max(MIN_BLOCK, -(-capacity // most))
    block_pages = min(block_pages, capacity)

    def allocate():
      pages = block_pages * self._groups
      self._blocks[index].append(
        caches.allocate_block(self.lm, window, pages, self.config.page_tokens, self.attention)
      )

    blocks = -(-capacity // block_pages)
    sizes = row_pages, block_pages, blocks, self.config.page_tokens
    return PagePool(slots, self._groups, *sizes, window, allocate)

  def _find_programs(self, prefixes: Sequence[Sequence[int]]) -> Programs:
    """Return the sizes of programs that are compiled for a model like this."""
    mixed, pools = self._mixed, self._pools
    shapes = tuple((pool.table.shape, pool.block_pages, pool.max_blocks) for pool in pools)
    shared = len(prefixes), prefix_capacity(prefixes)
    key = device.ModelSpec.from_lm(self.lm), self.config, shapes, shared
    blocks = tuple(tuple(range(1, pool.max_blocks + 1)) for pool in pools)
    pages = tuple(pool.block_pages for pool in pools)
    return find_programs(key, self._row_sizes, self._chunk_sizes, blocks, pages, mixed)

  @property
  def sampler(self) -> str:
    """What decides which tokens are drawn, for the keys of the journal.

    Attention by another kernel rounds otherwise. 'pages' has no name there, so that what an earlier
    version has sampled is still found.
    """
    return SAMPLER if self.attention == 'pages' else f'{SAMPLER}, {self.attention}'

  def reset(self) -> None:
    """Discard everything that an earlier run left unfinished."""
    self.collect()
    self.waiting.clear()
    self._waiting_since.clear()
    self.slots.active[:] = False
    for slot in range(len(self.cached)):
      self.clear(slot)

  def start(self, slot: int, order: int) -> None:
    """Give a slot to a chain.

    Args:
      slot: index of the slot.
      order: larger than that of all earlier chains, and the same in all models: then the chain that
        started first waits for pages in none of them, and no two chains wait for each other.
    """
    self._started[slot] = order

  def clear(self, slot: int) -> None:
    """Empty a slot's cache, and give its pages back."""
    self.cached[slot], self._max_cached[slot], self.slots.prefix[slot] = [], 0, -1
    self._started[slot] = -1
    for pool in self._pools:
      pool.shorten(slot, 0)

  def stop(self, slot: int, tokens: int) -> None:
    """End a slot's reply, and keep a part of its context and reply cached.

    Args:
      slot: index of the slot.
      tokens: number of tokens to keep.
    """
    self.slots.active[slot] = False
    del self.cached[slot][tokens:]

  def submit(self, slot: int, turn: Turn, key: np.ndarray, stop_token_ids: tuple[int, ...]) -> None:
    """Queue a turn.

    The tokens that the slot's cache shares with the turn's context are reused; the rest is
    prefilled later.

    Args:
      slot: index of the slot.
      turn: the turn to sample.
      key: u32[2], the turn's random key.
      stop_token_ids: all tokens that end the reply.
    """
    context, cached = turn.context, self.cached[slot]
    prefix, start = self.prefix_of(context)
    reused = common_length(cached, context[:-1]) if prefix == self.slots.prefix[slot] else 0
    windowed = any(self.lm.config.windows)
    self._max_cached[slot] = max(self._max_cached[slot], len(cached))
    rewound = self._max_cached[slot] - reused
    if reused < start or (windowed and rewound > self.config.rewind):
      reused = start
    if reused == start:
      self._max_cached[slot] = start
    self.stats.shared_tokens += start
    self.stats.reused_tokens += reused - start
    self.cached[slot] = context[:reused]
    self._base[slot] = start
    for pool in self._pools:
      pool.shorten(slot, reused - start)
    # The first decode step feeds the context's last token, so it is not prefilled.
    self.slots.start(slot, context[-1], len(context) - 1, key, turn.sampling, stop_token_ids)
    self.slots.prefix[slot] = prefix
    self._text[slot, : len(context)] = context
    self._start_penalties(slot, turn)
    self.waiting[slot], self._waiting_since[slot] = context[:-1], self._steps
    self._turns += 1
    self._new_tokens += len(context) - 1 - reused

  def _start_penalties(self, slot: int, turn: Turn) -> None:
    """Set the biases and penalties of a slot."""
    self._penalized[slot] = turn.sampling.changes_logits
    if self._penalized[slot] and self._penalties is None:
      self._penalties = Penalties.off(len(self.cached))
    if self._penalties is not None:
      self._penalties.start(slot, turn.sampling)

  def prefix_of(self, context: list[int]) -> tuple[int, int]:
    """Return the index and length of a context's shared prefix, or (-1, 0) if it has none."""
    return match_prefix(self.prefixes, context)

  @property
  def busy(self) -> bool:
    """Whether there is anything to prefill or decode."""
    return bool(self.waiting) or bool(self.slots.active.any())

  def dispatch(self, max_steps: int | None = None) -> None:
    """Dispatch a step with prefill, or a burst of decode steps, if there is anything to do.

    A slot's cache does not depend on how its tokens are divided into chunks, nor does a token on
    the rows beside it.

    Args:
      max_steps: limit on the number of steps, besides `config.longest_burst`; None sets none.
        With drafts, both limit the tokens of a row.
    """
    if max_steps == 0:
      return
    for slot in [s for s, target in self.waiting.items() if len(target) == len(self.cached[s])]:
      self._activate(slot)
    mixed = self._mixed
    segments: list[list[Segment]] = []
    while self.waiting and self._turns_to_wait_for() == 0:
      segments = self._next_segments()
      if not any(segments) or (mixed and self.slots.active.any()):
        break
      self._run([], segments, 0, 0)
      segments = []
    steps = min(self.config.longest_burst, max_steps or self.config.longest_burst)
    if self.waiting:
      steps = min(steps, MAX_MIXED_WAIT if mixed else MAX_WAIT)
    if self.slots.active.any():
      # A step that prefills has enough to compute without drafts.
      drafts = 0 if any(segments) else self._count_drafts()
      groups = self._choose_rows(1 if any(segments) else steps, drafts)
      if self.waiting and not any(groups) and not any(segments):
        # All replies wait for pages, so no step would ever end the wait for a full chunk.
        segments, drafts = self._next_segments(), 0
      if any(segments) or any(groups):
        self._run(groups, segments, max(1, self._turns_to_wait_for()), steps, drafts)

  def _run(
    self,
    groups: list[list[int]],
    segments: list[list[Segment]],
    max_ended: int,
    steps: int,
    drafts: int = 0,
  ) -> None:
    """Dispatch a program.

    Args:
      groups: the slots to decode in each batch shard; empty if none are.
      segments: the tokens to prefill in each batch shard; empty if none are.
      max_ended: stop once so many replies have ended.
      steps: stop once a row has sampled so many tokens.
      drafts: number of tokens that each row drafts in a step.
    """
    tokens = max((sum(len(s.tokens) for s in group) for group in segments), default=0)
    used = tuple(pool.used_blocks() for pool in self._pools)
    size = self._programs.choose(max(map(len, groups), default=0), tokens, used, drafts)
    for pool, count in zip(self._pools, size.blocks, strict=True):
      pool.grow(count)
    rows, before, penalties, chunk, text = None, None, None, None, None
    tables: tuple[RowTable, ...] = ()
    if size.rows:
      groups = groups or [[]] * self._groups
      padded = [sorted(group) + [-1] * (size.rows - len(group)) for group in groups]
      rows = np.array(padded, np.int32).reshape(-1)
      before = self.slots.select(rows)
      tables = tuple(map(self._row_table, self._pools, [rows] * len(size.blocks), size.blocks))
      if self._penalties is not None and self._penalized[rows[rows >= 0]].any():
        penalties = Penalties(*(x[rows] for x in self._penalties))
      if penalties is not None or drafts:
        text = self._text[rows]
    if size.tokens:
      chunk = self._pack(segments or [[]] * self._groups, size.tokens)
    compilations, begin = COMPILATIONS.count, time.perf_counter()
    result, cache = device.run(
      device.ModelSpec.from_lm(self.lm),
      self.lm.params,
      self._take_cache(size.blocks),
      self.prefix_caches,
      before,
      tables,
      chunk,
      (np.array(max_ended, np.int32), np.array(steps, np.int32)),
      device.Sizes(self.config.longest_burst, self._width, self.attention, drafts),
      penalties,
      text,
    )
    self._put_cache(cache)
    compiled = COMPILATIONS.count > compilations
    self._count_seconds(size, begin)
    if compiled:
      self._programs.record(size, time.perf_counter() - begin, compiled=True)
    for group in segments:
      for segment in group:
        if len(self.cached[segment.slot]) == len(self.waiting[segment.slot]):
          self._activate(segment.slot)
    if rows is None or before is None:
      self._prefilled = cast(jax.Array, result)
    elif not any(groups):
      self._prefilled = cast(jax.Array, cast(device.Burst, result).steps)
    else:
      result = cast(device.Burst, result)
      self._burst = _Running(result, rows, before, size, compiled, begin)

  def _count_seconds(self, size: Size, begin: float) -> None:
    """Add the time since `begin` to that of programs which prefill, or of those which do not."""
    seconds = time.perf_counter() - begin
    if size.tokens:
      self.stats.prefill_seconds += seconds
    else:
      self.stats.decode_seconds += seconds

  def _take_cache(self, blocks: Sequence[int]) -> Cache:
    """Return the blocks in use of each layer."""
    pools = [self._blocks[i][:count] for i, count in enumerate(blocks)]
    layers = [iter(zip(*pool, strict=True)) for pool in pools]
    config = self.lm.config
    windows = [self._windows.index(config.window(i)) for i in range(config.num_layers)]
    return tuple(next(layers[window]) for window in windows)

  def _put_cache(self, cache: Cache) -> None:
    """Store the blocks that a program returned."""
    for index, window in enumerate(self._windows):
      own = [layer for i, layer in enumerate(cache) if self.lm.config.window(i) == window]
      self._blocks[index][: len(own[0])] = list(zip(*own, strict=True))

  def _count_drafts(self) -> int:
    """Return how many tokens each row drafts in a step of the next burst."""
    if self._draft_choice is None:
      return 0 if self.config.draft_tokens == AUTO else self.config.draft_tokens
    return self._draft_choice.next(int(self.slots.active.reshape(self._groups, -1).sum(1).max()))

  def _choose_rows(self, steps: int, drafts: int) -> list[list[int]]:
    """Return the slots of each batch shard to decode, which have pages for the next steps.

    Args:
      steps: the burst ends once a row has sampled so many tokens.
      drafts: number of tokens that each row drafts in a step.
    """
    groups: list[list[int]] = [[] for _ in range(self._groups)]
    active = np.flatnonzero(self.slots.active)
    for slot in active[np.argsort(self._started[active], kind='stable')].tolist():
      left = int(self.slots.limit[slot] - self.slots.sampled[slot])
      tokens = int(self.slots.position[slot] - self._base[slot]) + min(steps + drafts, left)
      if self._extend(slot, tokens):
        groups[slot * self._groups // len(self.cached)].append(slot)
    return groups

  def _extend(self, slot: int, tokens: int) -> bool:
    """Give a slot pages for this many own tokens; return False if it has to wait for them.

    The chain that started first may take any page. The others leave as many as it may still need.
    """
    if not any(pool.missing(slot, tokens) for pool in self._pools):
      return True
    holders = np.flatnonzero(self._started >= 0)
    group = slot * self._groups // len(self.cached)
    holders = holders[holders * self._groups // len(self.cached) == group]
    first = holders[self._started[holders].argmin()]
    for pool in self._pools:
      needed = pool.missing(slot, tokens)
      reserved = pool.table.shape[1] - int(pool.count[first]) if slot != first else 0
      if needed and pool.free_pages(slot) < needed + reserved:
        return False
    for pool in self._pools:
      pool.extend(slot, tokens)
    return True

  def _row_table(self, pool: PagePool, rows: np.ndarray, blocks: int) -> RowTable:
    """Return where the rows are in the first blocks of a pool."""
    groups, page, total = self._groups, self.config.page_tokens, blocks * pool.block_pages
    pages = pool.select(rows, total).reshape(groups, -1, pool.table.shape[1])
    first = np.where(rows >= 0, self._base[rows] + pool.first[rows] * page, 0)
    first = first.astype(np.int32).reshape(groups, -1)
    owner = np.full((groups, total + 1), -1, np.int32)
    start = np.zeros((groups, total + 1), np.int32)
    for group in range(groups):
      owner[group, pages[group]] = np.arange(pages.shape[1])[:, None]
      start[group, pages[group]] = first[group][:, None] + page * np.arange(pages.shape[2])
    owner, start = owner[:, :total].copy(), start[:, :total].copy()
    return RowTable(owner, start, pages, first)  # type: ignore[arg-type]  # numpy arrays

  def collect(self) -> device.Burst | None:
    """Wait for the dispatched burst and update the state of the slots.

    Returns:
      The burst, or None if none was dispatched.

    Raises:
      UserError: if a log-probability is NaN.
    """
    if self._burst is None:
      return None
    if self._prefilled is not None:
      begin = time.perf_counter()
      self._prefilled.block_until_ready()
      self._prefilled = None
      self.stats.prefill_seconds += time.perf_counter() - begin
    begin = time.perf_counter()
    running, self._burst = self._burst, None
    rows, before = running.rows, running.before
    burst = device.Burst(*map(np.array, jax.device_get(running.burst)))
    slots = self.slots
    sampled = np.arange(burst.logprobs.shape[1]) < burst.num_sampled[:, None]
    if np.isnan(burst.logprobs[sampled]).any():
      raise UserError(
        f'{self.lm.name} produces NaN logits in {self.lm.dtype}: its weights are damaged or '
        "overflow this dtype. Try model.dtype='float32'."
      )
    for row in np.flatnonzero(burst.num_sampled):
      slot, count = rows[row], burst.num_sampled[row]
      new = burst.tokens[row, :count].tolist()
      # Each step caches the token that it is fed. The last sampled token has not been fed yet.
      self.cached[slot].extend([int(before.token[row]), *new[:-1]])
      end = slots.position[slot] + 1
      self._text[slot, end : end + count] = new
      slots.token[slot] = new[-1]
      slots.position[slot] += count
      slots.sampled[slot] += count
      slots.active[slot] = burst.active[row]
      for pool in self._pools:
        pool.forget(slot, len(self.cached[slot]) - self._base[slot], self.config.undo)
    seconds, stats = time.perf_counter() - begin, self.stats
    self._count_seconds(running.size, begin)
    self.step_seconds = seconds / max(int(burst.steps), 1)
    if not running.compiled:
      elapsed = time.perf_counter() - running.begin
      self._programs.record(running.size, elapsed / max(int(burst.steps), 1), compiled=False)
    self._record_drafts(running, burst)
    self._steps += int(burst.steps)
    occupied = int(burst.row_steps.sum())
    self._occupied += occupied
    stats.decode_steps += int(burst.steps)
    stats.occupied += occupied
    if running.size.drafts:
      stats.draft_steps += occupied
      stats.draft_tokens += int(burst.num_sampled.sum())
    stats.slot_steps += int(burst.steps) * len(rows)
    return self._by_slot(burst, rows)

  def _record_drafts(self, running: _Running, burst: device.Burst) -> None:
    """Take note of a burst that could have drafted."""
    if self._draft_choice is None or running.size.tokens:
      return
    active = int((running.rows >= 0).reshape(self._groups, -1).sum(1).max())
    seconds = time.perf_counter() - running.begin
    tokens = burst.num_sampled.sum() / max(burst.row_steps.sum(), 1) * burst.steps
    drafts, compiled = running.size.drafts, running.compiled
    self._draft_choice.record(active, drafts, seconds, float(tokens), compiled)

  def _by_slot(self, burst: device.Burst, rows: np.ndarray) -> device.Burst:
    """Return a burst with a row for each slot."""
    index, taken = rows[rows >= 0], rows >= 0

    def put(x):
      out = np.zeros((len(self.cached), *x.shape[1:]), x.dtype)
      out[index] = x[taken]
      return out

    per_row = burst._replace(steps=burst.row_steps)  # any array with rows
    return device.Burst(*map(put, per_row))._replace(steps=burst.steps)

  def _turns_to_wait_for(self) -> int:
    """Return how many turns should end before the next prefill; 0 to prefill now.

    A chunk takes about the same time however many tokens it has, so it should be full. But waiting
    slots are idle. They wait only if enough turns to fill a chunk are expected to end within
    MAX_WAIT steps, judging by the turns that ended per active slot and step so far, and no slot
    waits longer than that.
    """
    tokens = [0] * self._groups
    for slot, target in self.waiting.items():
      tokens[slot * self._groups // len(self.cached)] += len(target) - len(self.cached[slot])
    # A step that also decodes costs little more with a few tokens of padding.
    mixed = self._mixed
    size, max_wait = self._chunk_sizes[0], MAX_WAIT
    if mixed:
      size, max_wait = size // 2, MAX_MIXED_WAIT
    room, mean = self._groups * size - sum(tokens), self._new_tokens / max(self._turns, 1)
    turns = math.ceil(room / max(mean, 1))
    active = int(self.slots.active.sum())
    expected = max_wait * active * self._turns / max(self._occupied, 1) if self._steps else 0
    overdue = any(self._steps - self._waiting_since[slot] >= max_wait for slot in self.waiting)
    return 0 if overdue or max(tokens) >= size or turns > expected else turns

  def _next_segments(self) -> list[list[Segment]]:
    """Return the next tokens of waiting slots in each batch shard; none if they wait for pages."""
    groups: list[list[Segment]] = [[] for _ in range(self._groups)]
    size = self._chunk_tokens()
    left, pieces = [size] * self._groups, [piece_count(size, self._width)] * self._groups
    for slot in sorted(self.waiting, key=lambda slot: self._started[slot]):
      target, cached = self.waiting[slot], self.cached[slot]
      group = slot * self._groups // len(self.cached)
      room = min(left[group], pieces[group] * self._width)
      new = target[len(cached) : len(cached) + room]
      for pool in self._pools:
        pool.forget(slot, len(cached) - int(self._base[slot]), self.config.undo)
      if not new or not self._extend(slot, len(cached) + len(new) - int(self._base[slot])):
        continue
      groups[group].append(Segment(slot, new, len(cached)))
      left[group] -= len(new)
      pieces[group] -= -(-len(new) // self._width)
      cached.extend(new)
      self.stats.prefilled_tokens += len(new)
    return groups

  def _chunk_tokens(self) -> int:
    """Return how many tokens to prefill at most: a chunk size that they nearly fill."""
    tokens = [0] * self._groups
    for slot, target in self.waiting.items():
      tokens[slot * self._groups // len(self.cached)] += len(target) - len(self.cached[slot])
    longest = max(tokens)
    full = [size for size in self._chunk_sizes if size <= longest]
    above = next((size for size in self._chunk_sizes if size >= longest), None)
    if above is not None and (longest >= NEARLY_FULL * above or not full):
      return above
    return full[-1]

  def _pack(self, groups: Sequence[Sequence[Segment]], size: int) -> device.Chunk:
    """Pack segments of slots into a chunk of `size` tokens for each group.

    Args:
      groups: the segments of each group of slots in order, at most one for each slot. The slots
        have pages for all of their tokens.
      size: T, number of tokens of the chunk.
    """
    width, count, page = self._width, len(groups), self.config.page_tokens
    num_pieces = piece_count(size, width)
    tokens, prefix = np.zeros((count, size), np.int32), np.full((count, size), -1, np.int32)
    positions = np.full((count, size), -1, np.int32)
    starts, numbers = np.zeros((count, num_pieces), np.int32), np.zeros(count, np.int32)
    tables = [
      PieceTable(
        page=np.full((count, size), NO_PAGE, np.int32),  # type: ignore[arg-type]  # numpy arrays
        offset=np.zeros((count, size), np.int32),  # type: ignore[arg-type]
        pages=np.zeros((count, num_pieces, pool.table.shape[1]), np.int32),  # type: ignore[arg-type]
        num_pages=np.zeros((count, num_pieces), np.int32),  # type: ignore[arg-type]
        first=np.zeros((count, num_pieces), np.int32),  # type: ignore[arg-type]
      )
      for pool in self._pools
    ]
    for group, segments in enumerate(groups):
      end = 0
      for segment in segments:
        slot, base = segment.slot, int(self._base[segment.slot])
        begin, end = end, end + len(segment.tokens)
        offsets = np.arange(end - begin)
        tokens[group, begin:end], positions[group, begin:end] = (
          segment.tokens,
          segment.start + offsets,
        )
        prefix[group, begin:end] = self.slots.prefix[slot]
        for start in range(0, end - begin, width):
          piece = numbers[group]
          starts[group, piece] = begin + start
          last = segment.start - base + min(start + width, end - begin) - 1
          for pool, table in zip(self._pools, tables, strict=True):
            table.pages[group, piece] = np.maximum(pool.table[slot], 0)
            table.num_pages[group, piece] = last // page - pool.first[slot] + 1
            table.first[group, piece] = base + pool.first[slot] * page
          numbers[group] += 1
        number = segment.start - base + offsets
        for pool, table in zip(self._pools, tables, strict=True):
          table.page[group, begin:end] = pool.table[slot][number // page - pool.first[slot]]
          table.offset[group, begin:end] = number % page
    pieces = Pieces(starts, numbers, tuple(tables))  # type: ignore[arg-type]
    return device.Chunk(tokens, positions, prefix, pieces)

  def _activate(self, slot: int) -> None:
    """Start sampling the slot's reply."""
    del self.waiting[slot], self._waiting_since[slot]
    self.slots.active[slot] = True


def _trim_heap() -> None:
  """Return free heap memory to the operating system, if the C library can (glibc on Linux).

  On CPUs, compilation and the caches of deleted engines leave many small free blocks on the heap.
  Beside the cache about to be allocated they took half a gigabyte with a model of 0.5 GB.
  """
  library = ctypes.CDLL(None)
  if hasattr(library, 'malloc_trim'):
    library.malloc_trim(0)
