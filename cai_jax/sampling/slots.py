"""The host side of a model in memory: the contents of its slots, and what to compute next."""

import time
from collections.abc import Sequence
from typing import cast

import jax
import numpy as np

from cai_jax.model.cache import RowTable
from cai_jax.model.lm import LM
from cai_jax.runtime.mesh import batch_sharding, batch_shards, is_split, replicate
from cai_jax.sampling import caches, device
from cai_jax.sampling.chunks import Segment, pack_chunk
from cai_jax.sampling.config import EngineConfig, min_rows
from cai_jax.sampling.noise import SAMPLER
from cai_jax.sampling.page_cache import PageCache
from cai_jax.sampling.penalties import Penalties
from cai_jax.sampling.prefill_queue import PrefillQueue
from cai_jax.sampling.prefixes import common_length, match_prefix, prefix_capacity
from cai_jax.sampling.programs import Programs, find_programs
from cai_jax.sampling.running import Running, burst_by_slot, pad_rows
from cai_jax.sampling.stats import COMPILATIONS, Stats
from cai_jax.sampling.step_arrays import Burst, ModelSpec, Sizes, Slots, runs_in_parts
from cai_jax.sampling.timing import Timing, make_drafts
from cai_jax.sampling.types import Turn
from cai_jax.sampling.usage import fetch_usage, new_usage


class LocalModel:
  """The slots of one model: their caches on the device and their state on the host.

  Each slot serves one chain. `submit` queues a turn. Then steps (`dispatch`, then `collect`) bring
  the slot's cache up to the turn's context, and sample its reply.

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
    dispatch_waits: whether `dispatch` only returns once a burst of decode steps has ended.

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
    config.check_drafts(lm.config)
    caches.check_rows(lm, slots)
    caches.trim_heap()
    self._groups = batch_shards(lm.mesh)  # of slots; each group is on devices of its own
    self._is_split = is_split(lm.mesh)
    self._mixed = config.mixes(slots // self._groups, lm)
    self.dispatch_waits = runs_in_parts(lm.mesh)
    self._least = min_rows(lm) if caches.on_cpu(lm.mesh) else 0  # tokens of a step
    self._row_sizes = config.row_sizes(slots // self._groups, lm)
    self._chunk_sizes = config.chunk_sizes(slots, lm.mesh)
    if not self._mixed:  # a step of a chunk alone is padded to as many tokens
      least = min(self._least, self._chunk_sizes[-1])
      self._chunk_sizes = tuple(size for size in self._chunk_sizes if size >= least)
    self._width = config.piece_width(slots, lm.mesh)
    self.attention = config.choose_attention(lm)
    self._cache = PageCache(lm, slots, length, share, config, self.attention)
    self._programs = self._find_programs(prefixes)
    self.slots = Slots.empty(slots)
    self._penalties: Penalties | None = None  # made for the first turn that uses any
    self._penalized = np.zeros(slots, bool)  # the slots whose turn uses any
    # Context and reply of each slot. Entries beyond the slot's position are undefined.
    self._text = np.zeros((slots, length + max(map(len, prefixes), default=0)), np.int32)
    # Measured times must not choose between programs of other sizes where these give other bits,
    # nor in a replica of several processes, which measure different times.
    measured = self._mixed and lm.config.delta is None and not self._is_split
    drafts = make_drafts(config.draft_tokens, self._row_sizes, self._least, measured)
    self._timing = Timing(self._programs, stats, self._groups, self._is_split, drafts)
    self.cached: list[list[int]] = [[] for _ in range(slots)]
    self._max_cached = [0] * slots  # the most tokens that a slot has cached since it started over
    sizes = self._groups, self._chunk_sizes, self._width, self._mixed
    self._queue = PrefillQueue(self._cache, self.cached, *sizes)
    self.prefixes = [list(prefix) for prefix in prefixes]
    capacity = prefix_capacity(prefixes)
    prefilled = [
      device.prefill_prefix(lm, p, capacity, self._chunk_sizes[-1], self._width)
      for p in self.prefixes
    ]
    self.prefix_caches = tuple(prefix for prefix, _ in prefilled)
    self._prefix_usage = [usage for _, usage in prefilled]
    self._usage = new_usage(lm.config, batch_sharding(lm.mesh), self._groups)
    stats.prefix_tokens += sum(map(len, prefixes))
    self._prefilled: jax.Array | None = None  # ready when the dispatched chunks are
    self._burst: Running | None = None

  def _find_programs(self, prefixes: Sequence[Sequence[int]]) -> Programs:
    """Return the sizes of programs that are compiled for a model like this."""
    pools = self._cache.pools
    shared = len(prefixes), prefix_capacity(prefixes)
    key = ModelSpec.from_lm(self.lm), self.config, self._cache.shapes, shared
    blocks = tuple(pool.block_sizes for pool in pools)
    pages = tuple(pool.block_pages for pool in pools)
    sizes = self._row_sizes, self._chunk_sizes, blocks, pages
    return find_programs(key, *sizes, self._mixed, self._least)

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
    self._queue.clear()
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
    self._cache.started[slot] = order

  def clear(self, slot: int) -> None:
    """Empty a slot's cache, and give its pages back."""
    self.cached[slot], self._max_cached[slot], self.slots.prefix[slot] = [], 0, -1
    self._cache.clear(slot)

  def drop(self, slot: int) -> None:
    """End a slot's turn before its reply, and empty the slot's cache. No burst may be running."""
    self._queue.remove(slot)
    self.slots.active[slot] = False
    self.clear(slot)

  def stop(self, slot: int, tokens: int, exact: bool) -> None:
    """End a slot's reply, and keep a part of its context and reply cached.

    Args:
      slot: index of the slot.
      tokens: number of tokens to keep.
      exact: whether the slot surely has decoded no more. If it may have, a slot with states, which
        cannot go back, keeps nothing. What it has decoded depends on other chains, so that does not
        decide.
    """
    self.slots.active[slot] = False
    del self.cached[slot][tokens if exact or self.lm.config.delta is None else 0 :]

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
    stuck = self.lm.config.delta is not None and reused < len(cached)
    if reused < start or stuck or (windowed and rewound > self.config.rewind):
      reused = start
    if reused == start:
      self._max_cached[slot] = start
    self.stats.shared_tokens += start
    self.stats.reused_tokens += reused - start
    self.cached[slot] = context[:reused]
    self._cache.keep(slot, start, reused)
    # The first decode step feeds the context's last token, so it is not prefilled.
    self.slots.start(slot, context[-1], len(context) - 1, key, turn.sampling, stop_token_ids)
    self.slots.prefix[slot] = prefix
    self._text[slot, : len(context)] = context
    self._start_penalties(slot, turn)
    self._queue.add(slot, context[:-1])

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

  def expert_usage(self) -> np.ndarray:
    """Return how many tokens each expert has computed, i64[L,E]; see `fetch_usage`."""
    counts = replicate((self._usage, *self._prefix_usage), self.lm.mesh)
    return fetch_usage(self.lm.config, *counts)

  @property
  def busy(self) -> bool:
    """Whether there is anything to prefill or decode."""
    return bool(self._queue.waiting) or bool(self.slots.active.any())

  def dispatch_ahead(self, host_seconds: float, ended: bool) -> None:
    """Dispatch steps of the slots that go on, for about as long as the host will be busy.

    Args:
      host_seconds: how long the host was busy after the last burst.
      ended: whether it will be busy now, because replies have ended.
    """
    if self._is_split:  # its processes measure different times
      self.dispatch(int(ended))
    elif not self.dispatch_waits:
      self.dispatch(int(host_seconds / max(self._timing.step_seconds, 1e-9)))

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
    queue, active = self._queue, self.slots.active
    active[queue.take_ready()] = True
    segments: list[list[Segment]] = []
    while queue.waiting and queue.turns_to_wait_for(int(active.sum())) == 0:
      segments = queue.next_segments(self.slots.prefix)
      if not any(segments) or (self._mixed and active.any()):
        break
      self._run([], segments, 0, 0)
      segments = []
    if not active.any():
      return
    steps = min(self.config.longest_burst, max_steps or self.config.longest_burst)
    if queue.waiting:
      steps = min(steps, queue.max_wait)
    # A step that prefills has enough to compute without drafts.
    drafts = 0 if any(segments) else self._timing.count_drafts(active)
    groups = self._choose_rows(1 if any(segments) else steps, drafts)
    if queue.waiting and not any(groups) and not any(segments):
      # All replies wait for pages, so no step would ever end the wait for a full chunk.
      segments, drafts = queue.next_segments(self.slots.prefix), 0
    if any(segments) or any(groups):
      max_ended = max(1, queue.turns_to_wait_for(int(active.sum())))
      self._run(groups, segments, max_ended, steps, drafts)

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
    if self.dispatch_waits and any(groups):
      self._wait_for_prefill()  # otherwise its time would be that of this burst
    compilations, compiling = COMPILATIONS.count, COMPILATIONS.seconds
    begin = time.perf_counter()
    self._cache.compact()
    tokens = max((sum(len(s.tokens) for s in group) for group in segments), default=0)
    longest = max(map(len, groups), default=0)
    size = self._programs.choose(longest, tokens, self._cache.used_blocks(), drafts)
    rows, before, penalties, chunk, text = None, None, None, None, None
    tables: tuple[RowTable, ...] = ()
    if size.rows:
      rows = pad_rows(groups or [[]] * self._groups, size.rows)
      before = self.slots.select(rows)
      tables = self._cache.row_tables(rows, size.blocks)
      if self._penalties is not None and self._penalized[rows[rows >= 0]].any():
        penalties = Penalties(*(x[rows] for x in self._penalties))
      if penalties is not None or drafts:
        text = self._text[rows]
    if size.tokens:
      packed = segments or [[]] * self._groups
      chunk = pack_chunk(self._cache, packed, size.tokens, self._width)
    result, cache, self._usage = device.run(
      ModelSpec.from_lm(self.lm),
      self.lm.params,
      self._cache.take(size.blocks),
      self.prefix_caches,
      before,
      tables,
      chunk,
      (np.array(max_ended, np.int32), np.array(steps, np.int32)),
      Sizes(self.config.longest_burst, self._width, self.attention, drafts, self._least),
      penalties,
      text,
      self._usage,
    )
    self._cache.put(cache)
    compiled = COMPILATIONS.count > compilations
    self._timing.count_seconds(size, begin)
    if compiled:
      self._timing.record_program(size, COMPILATIONS.seconds - compiling, compiled=True)
    self.stats.prefilled_tokens += sum(len(s.tokens) for group in segments for s in group)
    self.slots.active[self._queue.take_ready()] = True
    if rows is None or before is None:
      self._prefilled = cast(jax.Array, result)
    elif not any(groups):
      self._prefilled = cast(jax.Array, cast(Burst, result).steps)
    else:
      result = cast(Burst, result)
      self._burst = Running(result, rows, before, size, compiled, begin)

  def _wait_for_prefill(self) -> None:
    """Wait for dispatched programs that only prefill."""
    if self._prefilled is not None:
      begin = time.perf_counter()
      self._prefilled.block_until_ready()
      self._prefilled = None
      self.stats.prefill_seconds += time.perf_counter() - begin

  def _choose_rows(self, steps: int, drafts: int) -> list[list[int]]:
    """Return the slots of each batch shard to decode, which have pages for the next steps.

    Args:
      steps: the burst ends once a row has sampled so many tokens.
      drafts: number of tokens that each row drafts in a step.
    """
    groups: list[list[int]] = [[] for _ in range(self._groups)]
    active = np.flatnonzero(self.slots.active)
    for slot in active[np.argsort(self._cache.started[active], kind='stable')].tolist():
      left = int(self.slots.limit[slot] - self.slots.sampled[slot])
      tokens = int(self.slots.position[slot]) + min(steps + drafts, left)
      if self._cache.extend(slot, tokens):
        groups[self._cache.group_of(slot)].append(slot)
    return groups

  def collect(self) -> Burst | None:
    """Wait for the dispatched burst and update the state of the slots.

    Returns:
      The burst, or None if none was dispatched.

    Raises:
      SampledError: if a log-probability is NaN.
    """
    if self._burst is None:
      return None
    self._wait_for_prefill()
    begin = time.perf_counter()
    running, self._burst = self._burst, None
    rows, before = running.rows, running.before
    burst, slots = running.fetch(self.lm), self.slots
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
      self._cache.forget(slot, len(self.cached[slot]))
    self._timing.record(running, burst, begin)
    self._queue.record(int(burst.steps), int(burst.row_steps.sum()))
    return burst_by_slot(burst, rows, len(self.cached))
