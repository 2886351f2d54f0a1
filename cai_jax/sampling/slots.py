"""The host's half of a model that samples here: its slots, what their caches hold, what waits."""

import ctypes
import dataclasses
import math
import time
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from cai_jax.model.cache import cache_lengths
from cai_jax.model.lm import LM
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import batch_shards
from cai_jax.sampling import device
from cai_jax.sampling.types import Turn

REWIND = 64  # tokens that a windowed layer's cache can take back; more, and a row starts afresh
WAIT = 8  # decode steps that a slot may wait for others, to be prefilled with them
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
  prefill_tokens: int = 128  # tokens of all slots prefilled together
  prefill_width: int = 16  # of them, tokens of a slot that attention takes together
  # Parts of a cache. A step reads those that some row has come to; on GPUs, each choice may cost a
  # trip to the host.
  spans: int = 4
  longest_burst: int = 32  # decode steps before the host looks for stop texts
  spare_tokens: int = 0  # of each slot, for replies that take more tokens in another tokenizer

  def __post_init__(self):
    positive = ('prefill_tokens', 'prefill_width', 'spans', 'longest_burst')
    for name in ('slots', 'cache_gib', *positive):
      value = getattr(self, name)
      if not 0 < value < math.inf or (name != 'cache_gib' and value < 1):
        raise UserError(f'engine: {name}={value}; it must be positive.')
    if self.spare_tokens < 0:
      raise UserError(f'engine: spare_tokens={self.spare_tokens}; it must be at least 0.')

  @property
  def slack(self) -> int:
    """Tokens that windowed layers keep besides their window: what may be written, then undone."""
    return -(-self.prefill_tokens // 8) * 8 + self.longest_burst + REWIND  # as `chunk` rounds

  def chunk(self, slots: int, mesh: Mesh) -> tuple[int, int]:
    """(T, C) of a chunk: tokens of each batch shard, and of a slot that attention takes together.

    A few slots seldom have much to prefill, so they get smaller chunks. T is a multiple of eight:
    CPUs compute what is over in another loop.
    """
    shards = batch_shards(mesh)
    size = min(self.prefill_tokens, 2 * self.prefill_width * slots) // shards
    size = -(-max(size, 1) // 8) * 8
    return size, min(size, self.prefill_width)

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
      shards = max(shards, batch_shards(lm.mesh))
    slots = self.slots
    if slots * of_slot > budget:
      fitting = int(max(budget, 0) / of_slot)
      bucket = 8 * shards if fitting >= 8 * shards else shards  # few sizes, so few programs
      slots = fitting // bucket * bucket
    if not slots:
      raise UserError(
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
  prefill_seconds: float = 0.0  # that the host waited for it, compiling included
  decode_seconds: float = 0.0  # that the host waited for it, compiling included
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
    device.check_rows(lm, self.rows)
    _trim_heap()
    lengths = cache_lengths(lm.config, length, config.slack, config.spans)
    self.cache = device.allocate(lm, self.rows, lengths)
    self.slots = device.Slots.empty(self.rows)
    self.held: list[list[int]] = [[] for _ in range(slots)]  # context that a slot's cache stands at
    self._deepest = [0] * slots  # most tokens that a slot has held since it started afresh
    self.waiting: dict[int, list[int]] = {}  # slot → tokens it shall hold before decoding
    self._since: dict[int, int] = {}  # slot → decode steps run when it began to wait
    self.prefixes = [list(prefix) for prefix in prefixes]
    self._groups = batch_shards(lm.mesh)  # of slots, each on devices of its own
    self._chunk_size, self._width = config.chunk(slots, lm.mesh)
    self._pieces = device.piece_count(self._chunk_size, self._width)
    room = prefix_room(prefixes)
    self.entries = tuple(
      device.prefill_prefix(lm, p, room, config.prefill_tokens, config.prefill_width)
      for p in self.prefixes
    )
    stats.prefix_tokens += sum(map(len, prefixes))
    self._prefilled = None  # there when the chunks under way are
    self._burst = None  # under way on the device, and the slots as they were when it began
    self.step_seconds = 0.0  # of the last burst
    self._steps = self._occupied = 0  # decode steps, and slots active in them, of all bursts
    self._turns, self._parts = 0, 0.0  # submitted, and the parts of chunks that they took

  def reset(self) -> None:
    """Forgets all that an earlier run left unfinished."""
    self.collect()
    self.waiting.clear()
    self._since.clear()
    self.slots.active[:] = False
    for slot in range(len(self.held)):
      self.clear(slot)

  def clear(self, slot: int) -> None:
    """Forgets what a slot's cache holds."""
    self.held[slot], self._deepest[slot], self.slots.prefix[slot] = [], 0, -1

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
    self._deepest[slot] = max(self._deepest[slot], len(held))
    if same < start or (windowed and self._deepest[slot] - same > REWIND):
      same = start
    if same == start:
      self._deepest[slot] = start
    self.stats.shared_tokens += start
    self.stats.reused_tokens += same - start
    self.held[slot] = context[:same]
    # The last token of the context is the first that decode feeds, so it is not prefilled.
    self.slots.start(slot, context[-1], len(context) - 1, key, turn.sampling, stop_token_ids)
    self.slots.prefix[slot] = prefix
    self.waiting[slot], self._since[slot] = context[:-1], self._steps
    self._turns, self._parts = self._turns + 1, self._parts + self._part(len(context) - 1 - same)

  def prefix_of(self, context: list[int]) -> tuple[int, int]:
    """(number, tokens) of the shared prefix that a context begins with; (-1, 0) is none."""
    return match_prefix(self.prefixes, context)

  @property
  def busy(self) -> bool:
    """Whether there is something to prefill or to decode."""
    return bool(self.waiting) or bool(self.slots.active.any())

  def prefill(self) -> None:
    """Starts to bring the caches of waiting slots up to their contexts, as far as it is worth it.

    What a slot's cache comes to hold does not depend on which chunk brought it.
    """
    for slot in [s for s, wanted in self.waiting.items() if len(wanted) == len(self.held[s])]:
      self._activate(slot)
    while self.waiting and self._turns_wanted() == 0:
      begin, chunk = time.perf_counter(), self._next_chunk()
      self.cache, self._prefilled = device.prefill(
        device.Kind.of(self.lm), self.lm.params, self.cache, self.entries, chunk
      )
      self.stats.prefill_seconds += time.perf_counter() - begin

  def _part(self, tokens: int) -> float:
    """The part of a group's chunk that so many tokens of a slot take."""
    return max(tokens / self._chunk_size, -(-tokens // self._width) / self._pieces)

  def _turns_wanted(self) -> int:
    """Turns that waiting slots should wait for to end; 0 if they should be prefilled now.

    A chunk takes about as long whatever is in it, so it should be full. But slots that wait do
    nothing: they wait only if a chunk's worth of turns is to be expected within WAIT steps, by how
    often a step has ended a slot's turn so far, and no longer than that.
    """
    parts = [0.0] * self._groups
    for slot, wanted in self.waiting.items():
      parts[slot * self._groups // self.rows] += self._part(len(wanted) - len(self.held[slot]))
    room, turn = self._groups - sum(parts), self._parts / max(self._turns, 1)
    turns = math.ceil(room / max(turn, 1 / self._chunk_size))
    active = int(self.slots.active.sum())
    expected = WAIT * active * self._turns / max(self._occupied, 1) if self._steps else 0
    overdue = any(self._steps - self._since[slot] >= WAIT for slot in self.waiting)
    return 0 if overdue or max(parts) >= 1 or turns > expected else turns

  def _next_chunk(self) -> device.Chunk:
    """The next tokens of waiting slots; those that then have all they need become active."""
    size, width = self._chunk_size, self._width
    groups: list[list[device.Part]] = [[] for _ in range(self._groups)]
    tokens, pieces = [size] * self._groups, [self._pieces] * self._groups
    for slot, wanted in list(self.waiting.items()):
      group, held = slot * self._groups // self.rows, self.held[slot]
      new = wanted[len(held) : len(held) + min(tokens[group], pieces[group] * width)]
      if not new:
        continue
      groups[group].append(device.Part(slot, new, len(held), int(self.slots.prefix[slot])))
      tokens[group] -= len(new)
      pieces[group] -= -(-len(new) // width)
      held.extend(new)
      self.stats.prefilled_tokens += len(new)
      if len(held) == len(wanted):
        self._activate(slot)
    return device.Chunk.pack(groups, self.rows, size, width)

  def _activate(self, slot: int) -> None:
    del self.waiting[slot], self._since[slot]
    self.slots.active[slot] = True

  def dispatch(self, longest: int | None = None) -> None:
    """Starts a burst of decode steps in the active slots, if there are any."""
    width = self.config.longest_burst
    steps = min(width, longest if longest is not None else width, WAIT if self.waiting else width)
    if not self.slots.active.any() or not steps:
      return
    begin, enough = time.perf_counter(), max(1, self._turns_wanted())
    before = device.Slots(*(x.copy() for x in self.slots))
    burst, self.cache = device.decode(
      device.Kind.of(self.lm),
      self.lm.params,
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
    if self._prefilled is not None:
      begin = time.perf_counter()
      self._prefilled.block_until_ready()
      self._prefilled = None
      self.stats.prefill_seconds += time.perf_counter() - begin
    begin = time.perf_counter()
    (burst, before), self._burst = self._burst, None
    burst = device.Burst(*map(np.array, jax.device_get(burst)))
    slots = self.slots
    sampled = np.arange(burst.logprobs.shape[1]) < burst.count[:, None]
    if np.isnan(burst.logprobs[sampled]).any():
      raise UserError(
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
    self._steps += int(burst.steps)
    self._occupied += int(burst.occupied)
    stats.decode_steps += int(burst.steps)
    stats.occupied += int(burst.occupied)
    stats.slot_steps += int(burst.steps) * len(self.held)
    stats.decode_seconds += seconds
    return burst


def _trim_heap() -> None:
  """Gives the system back what lies free on the heap, where the C library can: on Linux.

  On CPUs that is what compiling took, and caches of engines that are gone, in pieces: with what is
  now to be allocated it was half a gigabyte of a model of 0.5 GB.
  """
  library = ctypes.CDLL(None)
  if hasattr(library, 'malloc_trim'):
    library.malloc_trim(0)


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
