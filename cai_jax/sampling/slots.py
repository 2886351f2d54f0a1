"""The host side of a model in memory: the contents of its slots, and what to compute next."""

import ctypes
import math
import time
from collections.abc import Sequence

import jax
import numpy as np

from cai_jax.model.cache import cache_lengths
from cai_jax.model.lm import LM
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import batch_shards
from cai_jax.sampling import caches, device
from cai_jax.sampling.config import EngineConfig
from cai_jax.sampling.penalties import Penalties
from cai_jax.sampling.prefixes import common_length, match_prefix, prefix_capacity
from cai_jax.sampling.stats import Stats
from cai_jax.sampling.types import Turn

MAX_WAIT = 8  # decode steps that a slot may wait to share a prefill chunk with other slots


class LocalModel:
  """The slots of one model: their caches on the device and their state on the host.

  Each slot serves one chain. A turn passes through three steps: `submit` queues it, `prefill`
  brings the slot's cache up to its context, and bursts of decode steps (`dispatch`, then `collect`)
  sample its reply.

  Args:
    lm: the model.
    slots: number of slots.
    length: number of tokens of each slot's cache.
    prefixes: token ids of the shared prefixes, which the constructor prefills.
    config: sizes of the compiled programs.
    stats: counters that this model adds to.

  Attributes:
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
    prefixes: Sequence[Sequence[int]],
    config: EngineConfig,
    stats: Stats,
  ):
    self.lm, self.config, self.stats = lm, config, stats
    # In half precision, CPUs take six times as long to multiply a single row as two rows.
    self.rows = max(2, slots) if caches.on_cpu(lm.mesh) and lm.dtype != 'float32' else slots
    caches.check_rows(lm, self.rows)
    _trim_heap()
    lengths = cache_lengths(lm.config, length, config.slack, config.spans)
    self.cache = caches.allocate(lm, self.rows, lengths)
    self.slots = device.Slots.empty(self.rows)
    self._penalties: Penalties | None = None  # made for the first turn that uses any
    self._penalized = np.zeros(self.rows, bool)  # the slots whose turn uses any
    self._longest = length + max(map(len, prefixes), default=0)  # tokens of context and reply
    self.cached: list[list[int]] = [[] for _ in range(slots)]
    self._max_cached = [0] * slots  # the most tokens that a slot has cached since it started over
    self.waiting: dict[int, list[int]] = {}
    self._waiting_since: dict[int, int] = {}  # slot → decode steps run when it began to wait
    self.prefixes = [list(prefix) for prefix in prefixes]
    self._groups = batch_shards(lm.mesh)  # of slots; each group is on devices of its own
    self._chunk_size, self._width = config.chunk(slots, lm.mesh)
    self._max_pieces = device.piece_count(self._chunk_size, self._width)
    capacity = prefix_capacity(prefixes)
    self.prefix_caches = tuple(
      device.prefill_prefix(lm, p, capacity, config.prefill_tokens, config.prefill_width)
      for p in self.prefixes
    )
    stats.prefix_tokens += sum(map(len, prefixes))
    self._prefilled: jax.Array | None = (
      None  # an array that is ready when the dispatched chunks are
    )
    # The burst on the device, and the slots' state at its start.
    self._burst: tuple[device.Burst, device.Slots] | None = None
    self.step_seconds = 0.0
    self._steps = self._occupied = 0  # decode steps, and active slots summed over them
    self._turns, self._chunk_shares = 0, 0.0  # submitted turns, and the chunks that they fill

  def reset(self) -> None:
    """Discard everything that an earlier run left unfinished."""
    self.collect()
    self.waiting.clear()
    self._waiting_since.clear()
    self.slots.active[:] = False
    for slot in range(len(self.cached)):
      self.clear(slot)

  def clear(self, slot: int) -> None:
    """Treat a slot's cache as empty."""
    self.cached[slot], self._max_cached[slot], self.slots.prefix[slot] = [], 0, -1

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
    # The first decode step feeds the context's last token, so it is not prefilled.
    self.slots.start(slot, context[-1], len(context) - 1, key, turn.sampling, stop_token_ids)
    self.slots.prefix[slot] = prefix
    self._start_penalties(slot, turn)
    self.waiting[slot], self._waiting_since[slot] = context[:-1], self._steps
    self._turns += 1
    self._chunk_shares += self._chunk_share(len(context) - 1 - reused)

  def _start_penalties(self, slot: int, turn: Turn) -> None:
    """Set the biases and penalties of a slot."""
    self._penalized[slot] = turn.sampling.changes_logits
    if self._penalized[slot] and self._penalties is None:
      self._penalties = Penalties.off(self.rows, self._longest)
    if self._penalties is not None:
      self._penalties.start(slot, turn.context, turn.sampling)

  def prefix_of(self, context: list[int]) -> tuple[int, int]:
    """Return the index and length of a context's shared prefix, or (-1, 0) if it has none."""
    return match_prefix(self.prefixes, context)

  @property
  def busy(self) -> bool:
    """Whether there is anything to prefill or decode."""
    return bool(self.waiting) or bool(self.slots.active.any())

  def prefill(self) -> None:
    """Dispatch prefill chunks for the waiting slots, unless waiting for more slots is faster.

    A slot's cache does not depend on how its tokens are divided into chunks.
    """
    ready = [s for s, target in self.waiting.items() if len(target) == len(self.cached[s])]
    for slot in ready:
      self._activate(slot)
    while self.waiting and self._turns_to_wait_for() == 0:
      begin, chunk = time.perf_counter(), self._next_chunk()
      self.cache, self._prefilled = device.prefill(
        device.ModelSpec.from_lm(self.lm), self.lm.params, self.cache, self.prefix_caches, chunk
      )
      self.stats.prefill_seconds += time.perf_counter() - begin

  def dispatch(self, max_steps: int | None = None) -> None:
    """Dispatch a burst of decode steps if any slot is active.

    Args:
      max_steps: limit on the number of steps, besides `config.longest_burst`; None sets none.
    """
    capacity = self.config.longest_burst
    steps = min(
      capacity,
      capacity if max_steps is None else max_steps,
      MAX_WAIT if self.waiting else capacity,
    )
    if not self.slots.active.any() or not steps:
      return
    begin, max_ended = time.perf_counter(), max(1, self._turns_to_wait_for())
    before = device.Slots(*(x.copy() for x in self.slots))
    penalties = None
    if self._penalties is not None and (self._penalized & self.slots.active).any():
      penalties = Penalties(*(x.copy() for x in self._penalties))
    burst, self.cache = device.decode(
      device.ModelSpec.from_lm(self.lm),
      self.lm.params,
      self.cache,
      self.prefix_caches,
      before,
      np.array(max_ended, np.int32),
      np.array(steps, np.int32),
      capacity,
      penalties,
    )
    self._burst = burst, before
    self.stats.decode_seconds += time.perf_counter() - begin

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
    (burst, before), self._burst = self._burst, None
    burst = device.Burst(*map(np.array, jax.device_get(burst)))
    slots = self.slots
    sampled = np.arange(burst.logprobs.shape[1]) < burst.num_sampled[:, None]
    if np.isnan(burst.logprobs[sampled]).any():
      raise UserError(
        f'{self.lm.name} produces NaN logits in {self.lm.dtype}: its weights are damaged or '
        "overflow this dtype. Try model.dtype='float32'."
      )
    for slot in np.flatnonzero(burst.num_sampled):
      count = burst.num_sampled[slot]
      new = burst.tokens[slot, :count].tolist()
      # Each step caches the token that it is fed. The last sampled token has not been fed yet.
      self.cached[slot].extend([int(before.token[slot]), *new[:-1]])
      if self._penalties is not None:
        end = slots.position[slot] + 1
        self._penalties.tokens[slot, end : end + count] = new
      slots.token[slot] = new[-1]
      slots.position[slot] += count
      slots.sampled[slot] += count
      slots.active[slot] = burst.active[slot]
    seconds, stats = time.perf_counter() - begin, self.stats
    self.step_seconds = seconds / max(int(burst.steps), 1)
    self._steps += int(burst.steps)
    self._occupied += int(burst.occupied)
    stats.decode_steps += int(burst.steps)
    stats.occupied += int(burst.occupied)
    stats.slot_steps += int(burst.steps) * len(self.cached)
    stats.decode_seconds += seconds
    return burst

  def _chunk_share(self, tokens: int) -> float:
    """Return the share of a group's chunk that this many tokens of one slot use."""
    return max(tokens / self._chunk_size, -(-tokens // self._width) / self._max_pieces)

  def _turns_to_wait_for(self) -> int:
    """Return how many turns should end before the next prefill; 0 to prefill now.

    A chunk takes about the same time however many tokens it has, so it should be full. But waiting
    slots are idle. They wait only if enough turns to fill a chunk are expected to end within
    MAX_WAIT steps, judging by the turns that ended per active slot and step so far, and no slot
    waits longer than that.
    """
    shares = [0.0] * self._groups
    for slot, target in self.waiting.items():
      tokens = len(target) - len(self.cached[slot])
      shares[slot * self._groups // self.rows] += self._chunk_share(tokens)
    room, mean_share = self._groups - sum(shares), self._chunk_shares / max(self._turns, 1)
    turns = math.ceil(room / max(mean_share, 1 / self._chunk_size))
    active = int(self.slots.active.sum())
    expected = MAX_WAIT * active * self._turns / max(self._occupied, 1) if self._steps else 0
    overdue = any(self._steps - self._waiting_since[slot] >= MAX_WAIT for slot in self.waiting)
    return 0 if overdue or max(shares) >= 1 or turns > expected else turns

  def _next_chunk(self) -> device.Chunk:
    """Pack the next tokens of the waiting slots; activate the slots that need no more."""
    size, width = self._chunk_size, self._width
    groups: list[list[device.Segment]] = [[] for _ in range(self._groups)]
    tokens_left, pieces_left = [size] * self._groups, [self._max_pieces] * self._groups
    for slot, target in list(self.waiting.items()):
      group, cached = slot * self._groups // self.rows, self.cached[slot]
      room = min(tokens_left[group], pieces_left[group] * width)
      new = target[len(cached) : len(cached) + room]
      if not new:
        continue
      groups[group].append(device.Segment(slot, new, len(cached), int(self.slots.prefix[slot])))
      tokens_left[group] -= len(new)
      pieces_left[group] -= -(-len(new) // width)
      cached.extend(new)
      self.stats.prefilled_tokens += len(new)
      if len(cached) == len(target):
        self._activate(slot)
    return device.Chunk.pack(groups, self.rows, size, width)

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
