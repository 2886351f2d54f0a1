"""The host's half of a model that samples here: its slots, what their caches hold, what waits."""

import dataclasses
import math
import time
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from cai_jax import parallel
from cai_jax.model.lm import LM
from cai_jax.sampling import device
from cai_jax.sampling.types import Turn

REWIND = 64  # tokens that a windowed layer's cache can take back; more, and a row starts afresh
BLOCK = 64  # tokens that the lengths of caches are multiples of


@dataclasses.dataclass
class _Compilations:
  """Counts the programs that XLA compiles in this process."""

  count: int = 0

  def __call__(self, event: str, seconds: float, **_) -> None:
    self.count += event == '/jax/core/compile/backend_compile_duration'


COMPILED = _Compilations()
jax.monitoring.register_event_duration_secs_listener(COMPILED)


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """Sizes of the compiled programs. They change speed and memory, and results by rounding only."""

  slots: int = 64  # chains in flight, at most
  cache_gib: float = 8.0  # memory for caches on each device; fewer slots where it is too little
  prefill_chunks: tuple[int, ...] = (64, 16)  # tokens of a slot prefilled together: few sizes
  prefill_tokens: int = 128  # tokens of all slots prefilled together
  longest_burst: int = 32  # decode steps before the host looks for stop texts
  spare_tokens: int = 0  # of each slot, for replies that take more tokens in another tokenizer

  def __post_init__(self):
    for name in ('slots', 'cache_gib', 'prefill_tokens', 'longest_burst'):
      value = getattr(self, name)
      if not 0 < value < math.inf or (name != 'cache_gib' and value < 1):
        raise ValueError(f'engine: {name}={value}; it must be positive.')
    if self.spare_tokens < 0:
      raise ValueError(f'engine: spare_tokens={self.spare_tokens}; it must be at least 0.')
    chunks = self.prefill_chunks
    if not chunks or not all(isinstance(size, int) and size >= 1 for size in chunks):
      raise ValueError(
        f'engine: prefill_chunks={chunks!r}; it must be a tuple of positive integers.'
      )

  @property
  def slack(self) -> int:
    """Tokens that windowed layers keep besides their window: what may be written, then undone."""
    return max(self.prefill_chunks) + self.longest_burst + REWIND

  def chunk_rows(self, chunk: int, mesh: Mesh) -> int:
    """Slots that are prefilled together in chunks of that size: as many on each batch shard."""
    shards = parallel.batch_shards(mesh)
    return max(1, round(self.prefill_tokens / chunk / shards)) * shards

  def chunk_for(self, tokens: int) -> int:
    """The chunk that is taken next of so many tokens: a function of the chain alone."""
    sizes = sorted(self.prefill_chunks, reverse=True)
    return next((size for size in sizes if tokens > size // 2), sizes[-1])

  def fit(self, models: Sequence[LM], length: int, prefix_tokens: Sequence[int]) -> int:
    """Slots that the budget has room for, at most `slots`.

    Args:
      models: that have caches.
      length: tokens of a slot's cache.
      prefix_tokens: for each model, tokens of its shared prefixes with their padding.

    Raises:
      ValueError: if there is room for none.
    """
    budget, of_slot, shards = self.cache_gib * 2**30, 0.0, 1
    for lm, tokens in zip(models, prefix_tokens, strict=True):
      of_slot += device.cache_bytes(lm, length, self.slack) / lm.mesh.size
      budget -= tokens * device.cache_bytes(lm, 1, 0) / lm.mesh.shape['tensor']
      shards = max(shards, parallel.batch_shards(lm.mesh))
    slots = self.slots
    if slots * of_slot > budget:
      fitting = int(max(budget, 0) / of_slot)
      bucket = 8 * shards if fitting >= 8 * shards else shards  # few sizes, so few programs
      slots = fitting // bucket * bucket
    if not slots:
      raise ValueError(
        f'engine.cache_gib={self.cache_gib}: {shards} slots of {length} tokens and the shared '
        f'prefixes need {(shards * of_slot + self.cache_gib * 2**30 - budget) / 2**30:.3g} GiB on '
        'each device. Give more, or shorten prompts, max_tokens, rounds or demonstrations.'
      )
    return slots


@dataclasses.dataclass
class Stats:
  """Counts and seconds of a run, summed over models."""

  slots: int = 0
  most_slots: int = 0  # that the config allows
  chains: int = 0
  turns: int = 0  # sampled
  replayed_turns: int = 0  # found in the journal
  sampled_tokens: int = 0
  prefilled_tokens: int = 0
  prefix_tokens: int = 0  # prefilled once, for all rows
  shared_tokens: int = 0  # context tokens that lay in a shared prefix
  reused_tokens: int = 0  # context tokens that a slot's own cache held already
  decode_steps: int = 0
  occupied: int = 0  # slots active, summed over decode steps
  slot_steps: int = 0  # slots, summed over decode steps
  compilations: int = 0
  prefill_seconds: float = 0.0  # that the host waited for it
  decode_seconds: float = 0.0  # that the host waited for it
  remote_seconds: float = 0.0  # that there was nothing to do but wait for other servers
  seconds: float = 0.0

  def summary(self) -> dict[str, float]:
    """All counts, with tokens a second, the share of slots occupied, and the host's own seconds."""
    waited = self.prefill_seconds + self.decode_seconds + self.remote_seconds
    return dataclasses.asdict(self) | {
      'host_seconds': self.seconds - waited,
      'tokens_per_second': self.sampled_tokens / max(self.seconds, 1e-9),
      'occupancy': self.occupied / max(self.slot_steps, 1),
    }


def describe(summary: dict[str, float]) -> str:
  """A `Stats.summary()` in a few lines of text."""
  s = summary
  waits = [f'{s[f"{kind}_seconds"]:.1f} s {kind}' for kind in ('prefill', 'decode', 'host')]
  slots = f'{s["slots"]} slots'
  if s['slots'] < s['most_slots']:
    slots += f' of {s["most_slots"]}, as engine.cache_gib allows'
  waits += [f'{s["remote_seconds"]:.1f} s other servers'] * bool(s['remote_seconds'])
  return (
    f'  {s["turns"]:,} turns sampled, {s["replayed_turns"]:,} from the journal; '
    f'{s["sampled_tokens"]:,} tokens at {s["tokens_per_second"]:,.0f} a second\n'
    f'  context tokens: {s["prefilled_tokens"]:,} prefilled, {s["reused_tokens"]:,} reused, '
    f'{s["shared_tokens"]:,} in a shared prefix\n'
    f'  {slots}, {100 * s["occupancy"]:.0f} % occupied; {", ".join(waits)}; '
    f'{s["compilations"]} compilations'
  )


class LocalModel:
  """One model's slots.

  Args:
    lm: the model.
    slots: how many.
    length: tokens of each slot's cache.
    prefixes: token ids that contexts may begin with, computed once.
    config: sizes of the programs.
    stats: counted into.
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
    # CPUs multiply a single row in half precision six times as slowly as two.
    self.rows = max(2, slots) if device.on_cpu(lm.mesh) and lm.dtype != 'float32' else slots
    self.cache = device.allocate(lm, self.rows, length, config.slack)
    self.slots = device.Slots.empty(self.rows)
    self.held: list[list[int]] = [[] for _ in range(slots)]  # context that a slot's cache stands at
    self.waiting: dict[int, list[int]] = {}  # slot → tokens it shall hold before decoding
    self.prefixes = [list(prefix) for prefix in prefixes]
    chunk, room = max(config.prefill_chunks), prefix_room(prefixes)
    self.entries = tuple(device.prefill_prefix(lm, p, room, chunk) for p in self.prefixes)
    stats.prefix_tokens += sum(map(len, prefixes))
    self._burst = None  # under way on the device, and the slots as they were when it began
    self.step_seconds = 0.0  # of the last burst

  def reset(self) -> None:
    """Forgets all that an earlier run left unfinished."""
    self.collect()
    self.waiting.clear()
    self.slots.active[:] = False
    for slot in range(len(self.held)):
      self.clear(slot)

  def clear(self, slot: int) -> None:
    """Forgets what a slot's cache holds."""
    self.held[slot], self.slots.prefix[slot] = [], -1

  def stop(self, slot: int, tokens: int) -> None:
    """Ends a slot's reply, of whose context and reply it keeps so many tokens."""
    self.slots.active[slot] = False
    del self.held[slot][tokens:]

  def submit(self, slot: int, turn: Turn, key: np.ndarray, stop_token_ids: tuple[int, ...]) -> None:
    """Queues a turn: its context is prefilled as far as needed, then its reply is sampled."""
    context, held = turn.context, self.held[slot]
    prefix, start = self.prefix_of(context)
    same = _common_prefix(held, context[:-1]) if prefix == self.slots.prefix[slot] else 0
    windowed = any(self.lm.config.windows)
    if same < start or (windowed and len(held) - same > REWIND):
      same = start
    self.stats.shared_tokens += start
    self.stats.reused_tokens += same - start
    self.held[slot] = context[:same]
    # The last token of the context is the first that decode feeds, so it is not prefilled.
    self.slots.start(slot, context[-1], len(context) - 1, key, turn.sampling, stop_token_ids)
    self.slots.prefix[slot] = prefix
    self.waiting[slot] = context[:-1]

  def prefix_of(self, context: list[int]) -> tuple[int, int]:
    """(number, tokens) of the shared prefix that a context begins with; (-1, 0) is none."""
    return match_prefix(self.prefixes, context)

  @property
  def busy(self) -> bool:
    """Whether there is something to prefill or to decode."""
    return bool(self.waiting) or bool(self.slots.active.any())

  def prefill(self) -> None:
    """Brings the cache of every waiting slot up to its context."""
    start = time.perf_counter()
    begun, lm, kind = bool(self.waiting), self.lm, device.Kind.of(self.lm)
    while batch := self._next_batch():
      chunk, slots = batch
      rows = self.config.chunk_rows(chunk, self.lm.mesh)
      tokens = np.zeros((rows, chunk), np.int32)
      starts, counts, places = (np.zeros(rows, np.int32) for _ in range(3))
      prefix = np.full(rows, -1, np.int32)
      for row, slot in enumerate(slots):
        held = len(self.held[slot])
        new = self.waiting[slot][held : held + chunk]
        tokens[row, : len(new)] = new
        starts[row], counts[row], places[row] = held, len(new), slot
        prefix[row] = self.slots.prefix[slot]
        self.held[slot].extend(new)
        self.stats.prefilled_tokens += len(new)
      piece = device.Chunk(tokens, starts, counts, places, prefix)
      self.cache = device.prefill(kind, lm.params, self.cache, self.entries, piece)
    if begun:
      jax.block_until_ready(self.cache)
      self.stats.prefill_seconds += time.perf_counter() - start

  def _next_batch(self) -> tuple[int, list[int]] | None:
    """(chunk, slots to prefill in it); slots that have all they need become active."""
    groups: dict[int, list[int]] = {}
    for slot, wanted in list(self.waiting.items()):
      missing = len(wanted) - len(self.held[slot])
      if missing:
        groups.setdefault(self.config.chunk_for(missing), []).append(slot)
      else:
        del self.waiting[slot]
        self.slots.active[slot] = True
    if not groups:
      return None
    # The fullest batch first: by then others may have come to fill theirs.
    chunk = max(
      groups, key=lambda size: len(groups[size]) / self.config.chunk_rows(size, self.lm.mesh)
    )
    return chunk, groups[chunk][: self.config.chunk_rows(chunk, self.lm.mesh)]

  def dispatch(self, longest: int | None = None) -> None:
    """Starts a burst of decode steps in the active slots, if there are any."""
    active, width = int(self.slots.active.sum()), self.config.longest_burst
    steps = width if longest is None else min(width, longest)
    if not active or not steps:
      return
    begin = time.perf_counter()
    # A few done slots are worth refilling together; near the end of a run, a single one is.
    enough = max(1, active // 16)
    before = device.Slots(*(x.copy() for x in self.slots))
    lm = self.lm
    burst, self.cache = device.decode(
      device.Kind.of(lm),
      lm.params,
      self.cache,
      self.entries,
      before,
      np.int32(enough),
      np.int32(steps),
      width,
    )
    self._burst = burst, before
    self.stats.decode_seconds += time.perf_counter() - begin

  def collect(self) -> device.Burst | None:
    """Waits for the burst under way, if there is one, and brings slots and `held` up to it."""
    if self._burst is None:
      return None
    begin = time.perf_counter()
    (burst, before), self._burst = self._burst, None
    burst = device.Burst(*map(np.array, jax.device_get(burst)))
    slots = self.slots
    sampled = np.arange(burst.logprobs.shape[1]) < burst.count[:, None]
    if np.isnan(burst.logprobs[sampled]).any():
      raise ValueError(
        f'{self.lm.name} in {self.lm.dtype} gives logits that are no numbers (NaN): its weights '
        "are damaged, or too large for that type. Try model.dtype='float32'."
      )
    for slot in np.flatnonzero(burst.count):
      count = burst.count[slot]
      new = burst.tokens[slot, :count].tolist()
      # The token fed at each step entered the cache; the last one sampled was not fed yet.
      self.held[slot].extend([int(before.token[slot]), *new[:-1]])
      slots.token[slot] = new[-1]
      slots.position[slot] += count
      slots.sampled[slot] += count
      slots.active[slot] = burst.active[slot]
    seconds, stats = time.perf_counter() - begin, self.stats
    self.step_seconds = seconds / max(int(burst.steps), 1)
    stats.decode_steps += int(burst.steps)
    stats.occupied += int(burst.occupied)
    stats.slot_steps += int(burst.steps) * len(self.held)
    stats.decode_seconds += seconds
    return burst


def match_prefix(prefixes: Sequence[list[int]], context: list[int]) -> tuple[int, int]:
  """(number, tokens) of the longest of `prefixes` that a context goes on from; (-1, 0) is none."""
  sizes = ((len(p), i) for i, p in enumerate(prefixes))
  fits = [(n, i) for n, i in sizes if n < len(context) and context[:n] == prefixes[i]]
  tokens, number = max(fits, default=(0, -1))
  return number, tokens


def prefix_room(prefixes: Sequence[Sequence[int]]) -> int:
  """Tokens that the cache of each of a model's prefixes has: one size, so one program."""
  return -(-max(map(len, prefixes), default=0) // BLOCK) * BLOCK


def _common_prefix(a: list[int], b: list[int]) -> int:
  """Number of leading tokens that two sequences share."""
  if a == b[: len(a)]:
    return len(a)
  return next(
    (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
  )
