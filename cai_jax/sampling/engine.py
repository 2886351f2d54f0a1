"""The engine: many chains of turns over a fixed number of slots, each slot with a live KV cache.

A slot belongs to one chain from its first turn to its last, in every model. When a turn ends, the
chain is asked for its next one at once; only the tokens that its cache does not hold are prefilled.
How much is reused depends on the chain alone, never on what the slot held before, so that with the
same sizes and devices a chain gives the same bits alone, in a full batch, and after a restart.
"""

import dataclasses
import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from cai_jax.model.lm import LM
from cai_jax.sampling import device
from cai_jax.sampling.journal import Journal, digest
from cai_jax.sampling.types import MAX_STOP_TOKENS, Chain, Completion, Turn


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """Sizes of the compiled programs. They change speed and memory, and results by rounding only."""

  slots: int = 64  # chains in flight
  prefill_rows: int = 8  # slots prefilled together, and slots done before a decode burst ends
  prefill_chunk: int = 32  # tokens of each prefilled together
  longest_burst: int = 32  # decode steps before the host looks for stop texts

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if getattr(self, field.name) < 1:
        raise ValueError(
          f'engine: {field.name}={getattr(self, field.name)}; it must be at least 1.'
        )


@dataclasses.dataclass
class Stats:
  """Counts and seconds of a run, summed over models."""

  chains: int = 0
  turns: int = 0  # sampled
  replayed_turns: int = 0  # found in the journal
  sampled_tokens: int = 0
  prefilled_tokens: int = 0
  reused_tokens: int = 0  # context tokens that a slot's cache held already
  decode_steps: int = 0
  occupied: int = 0  # slots active, summed over decode steps
  slot_steps: int = 0  # slots, summed over decode steps
  prefill_seconds: float = 0.0
  decode_seconds: float = 0.0
  seconds: float = 0.0

  def summary(self) -> dict[str, float]:
    """All counts, with tokens per second and the share of slots occupied."""
    return dataclasses.asdict(self) | {
      'tokens_per_second': self.sampled_tokens / max(self.seconds, 1e-9),
      'occupancy': self.occupied / max(self.slot_steps, 1),
    }


def turn_key(seed: int, chain_id: str, turn: str) -> np.ndarray:
  """u32[2]: the random key of a turn, a function of its names; positions are folded in later."""
  text = f'{seed}\0{chain_id}\0{turn}'.encode()
  return np.frombuffer(hashlib.blake2b(text, digest_size=8).digest(), np.uint32)


@dataclasses.dataclass(eq=False)
class _Active:
  """A chain in a slot, and the turn it waits for."""

  id: str
  chain: Chain
  slot: int
  turn: Turn | None = None
  digest: str = ''
  tokens: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)
  finished: list[tuple[str, Completion]] = dataclasses.field(default_factory=list)
  result: Any = None


class _Model:
  """One model's slots: its cache, what each slot's cache holds, and what waits for prefill."""

  def __init__(self, lm: LM, config: EngineConfig, length: int, stats: Stats):
    if length > lm.config.max_positions:
      raise ValueError(
        f'a context of {length} tokens is longer than the {lm.config.max_positions} that '
        f'{lm.name} was made for; shorten prompts, max_tokens or the number of rounds.'
      )
    self.lm, self.config, self.stats, self.length = lm, config, stats, length
    self.cache = device.allocate(lm, config.slots, length)
    self.slots = device.Slots.empty(config.slots)
    self.held: list[list[int]] = [[] for _ in range(config.slots)]  # tokens of each slot's cache
    self.waiting: dict[int, list[int]] = {}  # slot → tokens its cache shall hold before decoding

  def clear(self, slot: int) -> None:
    """Forgets what a slot's cache holds."""
    self.held[slot] = []

  def submit(self, slot: int, turn: Turn, key: np.ndarray, stop_token_ids: tuple[int, ...]) -> None:
    """Queues a turn: its context is prefilled as far as needed, then its reply is sampled."""
    context = turn.context
    same = _common_prefix(self.held[slot], context[:-1])
    self.stats.reused_tokens += same
    del self.held[slot][same:]
    # The last token of the context is the first that decode feeds, so it is not prefilled.
    self.slots.start(slot, context[-1], len(context) - 1, key, turn.sampling, stop_token_ids)
    self.slots.active[slot] = False
    self.waiting[slot] = context[:-1]

  def prefill(self) -> None:
    """Brings the cache of every waiting slot up to its context."""
    start = time.perf_counter()
    rows, chunk = self.config.prefill_rows, self.config.prefill_chunk
    while self.waiting:
      for slot in [s for s, wanted in self.waiting.items() if len(self.held[s]) == len(wanted)]:
        del self.waiting[slot]
        self.slots.active[slot] = True
      batch = list(self.waiting)[:rows]
      if not batch:
        break
      tokens = np.zeros((rows, chunk), np.int32)
      starts, counts, places = (np.zeros(rows, np.int32) for _ in range(3))
      for row, slot in enumerate(batch):
        held = len(self.held[slot])
        new = self.waiting[slot][held : held + chunk]
        tokens[row, : len(new)] = new
        starts[row], counts[row], places[row] = held, len(new), slot
        self.held[slot].extend(new)
        self.stats.prefilled_tokens += len(new)
      self.cache = device.prefill(
        self.lm.graph, self.lm.params, self.cache, tokens, starts, counts, places, self.lm.mesh
      )
    jax.block_until_ready(self.cache)
    self.stats.prefill_seconds += time.perf_counter() - start

  def decode(self) -> device.Burst | None:
    """Runs a burst of decode steps, if a slot is active, and brings `held` up to it."""
    if not self.slots.active.any():
      return None
    start = time.perf_counter()
    before = self.slots
    # A few done slots are worth refilling together; near the end of a run, a single one is.
    enough = np.int32(max(1, min(self.config.prefill_rows, before.active.sum() // 4)))
    longest = self.config.longest_burst
    burst, self.cache = device.decode(
      self.lm.graph, self.lm.params, self.cache, before, enough, longest, self.lm.mesh
    )
    burst = device.Burst(*map(np.array, jax.device_get(burst)))
    for slot in np.flatnonzero(before.active):
      count = burst.count[slot]
      new = burst.tokens[slot, :count].tolist()
      # The token fed at each step entered the cache; the last one sampled was not fed yet.
      self.held[slot].extend([int(before.token[slot]), *new[:-1]])
      before.token[slot] = new[-1]
    self.slots = before._replace(
      position=before.position + burst.count,
      sampled=before.sampled + burst.count,
      active=burst.active,
    )
    stats = self.stats
    stats.decode_steps += int(burst.steps)
    stats.occupied += int(burst.occupied)
    stats.slot_steps += int(burst.steps) * self.config.slots
    stats.decode_seconds += time.perf_counter() - start
    return burst


class Engine:
  """Runs chains over the slots of one or several models.

  Args:
    models: by the name that `Turn.model` uses.
    length: tokens that a slot's cache holds: no chain's context and reply may be longer.
    seed: of all sampling.
    config: sizes of the compiled programs.
    journal: where finished turns are kept and looked up; None keeps nothing.
    stops: for each model, token ids and texts that end each of its replies (a dialogue's own).
  """

  def __init__(
    self,
    models: Mapping[str, LM],
    *,
    length: int,
    seed: int,
    config: EngineConfig = EngineConfig(),
    journal: Journal | None = None,
    stops: Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]] | None = None,
  ):
    self.stats = Stats()
    self.seed, self.journal, self.config, self.length = seed, journal, config, length
    self._models = {name: _Model(lm, config, length, self.stats) for name, lm in models.items()}
    self._stops = {name: ((), ()) for name in models} | dict(stops or {})

  def run(self, chains: Iterable[tuple[str, Chain]]) -> Iterator[tuple[str, Any]]:
    """(id, result) of each chain, as they finish.

    Chains are taken from the iterable when a slot is free, so neither they nor their results need
    to fit in memory.

    Raises:
      ValueError: if a turn does not fit the cache, or names a model that is not there.
    """
    begin = time.perf_counter()
    source = iter(chains)
    free = list(range(self.config.slots))[::-1]
    active: dict[int, _Active] = {}
    exhausted = False
    while active or not exhausted:
      while free and not exhausted:
        item = next(source, None)
        if item is None:
          exhausted = True
          break
        entry = _Active(*item, slot=free[-1])
        if self._advance(entry, None):
          active[free.pop()] = entry
        else:
          yield self._finish(entry)
      for entry in self._step(active):
        if not self._advance(entry, self._complete(entry)):
          free.append(entry.slot)
          del active[entry.slot]
          yield self._finish(entry)
      now = time.perf_counter()
      self.stats.seconds, begin = self.stats.seconds + now - begin, now

  def _step(self, active: dict[int, _Active]) -> list[_Active]:
    """Prefills and decodes once in every model; the chains whose turn has ended."""
    ended = []
    for name, model in self._models.items():
      model.prefill()
      burst = model.decode()
      if burst is None:
        continue
      for slot in np.flatnonzero(burst.count):
        entry, count = active[int(slot)], burst.count[slot]
        entry.tokens += burst.tokens[slot, :count].tolist()
        entry.logprobs += burst.logprobs[slot, :count].tolist()
        if not burst.active[slot] or self._stop_text(name, entry):
          model.slots.active[slot] = False
          ended.append(entry)
    return ended

  def _advance(self, entry: _Active, completion: Completion | None) -> bool:
    """Sends a chain its completion until it wants a turn sampled; False when it is finished."""
    while True:
      try:
        turn = entry.chain.send(completion)
      except StopIteration as stop:
        entry.result = stop.value
        return False
      self._check(entry.id, turn)
      tokens, texts = self._turn_stops(turn)
      key = turn_key(self.seed, entry.id, turn.name)
      model = self._models[turn.model]
      entry.digest = digest(
        model.lm.fingerprint, turn.context, turn.sampling, (tokens, texts), key.tobytes()
      )
      completion = None if self.journal is None else self.journal.get(entry.digest)
      if completion is None:
        entry.turn, entry.tokens, entry.logprobs = turn, [], []
        model.submit(entry.slot, turn, key, tokens)
        return True
      self.stats.replayed_turns += 1

  def _complete(self, entry: _Active) -> Completion:
    """The completion of the turn that has just ended."""
    turn = entry.turn
    tokenizer = self._models[turn.model].lm.tokenizer
    stop_tokens, stop_texts = self._turn_stops(turn)
    tokens = entry.tokens
    cut = _first_stop_text(tokenizer, tokens, stop_texts)
    if cut is not None:
      count, text = cut
      tokens, reason = tokens[:count], 'stop_text'
      # What was decoded beyond it hangs on where the burst ended, and so on other chains.
      del self._models[turn.model].held[entry.slot][len(turn.context) + count - 1 :]
    elif tokens[-1] in stop_tokens:
      text, reason = _decode(tokenizer, tokens[:-1]), 'stop'
    else:
      text, reason = _decode(tokenizer, tokens), 'length'
    logprobs = [float(f'{x:.9g}') for x in entry.logprobs[: len(tokens)]]
    completion = Completion(tokens, text, logprobs, reason)
    entry.finished.append((entry.digest, completion))
    self.stats.turns += 1
    self.stats.sampled_tokens += len(tokens)
    return completion

  def _finish(self, entry: _Active) -> tuple[str, Any]:
    """Journals a finished chain's turns and frees what its slots held; (id, result).

    All turns of a chain enter the journal together. After a kill an unfinished chain then starts
    from what an earlier run had finished, and so computes the same bits as one never killed.
    """
    if self.journal is not None and entry.finished:
      self.journal.put(entry.finished)
    for model in self._models.values():
      model.clear(entry.slot)
    self.stats.chains += 1
    return entry.id, entry.result

  def _stop_text(self, name: str, entry: _Active) -> bool:
    texts = self._turn_stops(entry.turn)[1]
    tokenizer = self._models[name].lm.tokenizer
    return _first_stop_text(tokenizer, entry.tokens, texts) is not None

  def _turn_stops(self, turn: Turn) -> tuple[tuple[int, ...], tuple[str, ...]]:
    tokens, texts = self._stops[turn.model]
    tokens = tuple(dict.fromkeys((*tokens, *turn.sampling.stop_token_ids)))
    return tokens, tuple(dict.fromkeys((*texts, *turn.sampling.stop)))

  def _check(self, chain_id: str, turn: Turn) -> None:
    if turn.model not in self._models:
      raise ValueError(
        f'chain {chain_id!r}: no model {turn.model!r}; there is {", ".join(self._models)}.'
      )
    if not turn.context:
      raise ValueError(f'chain {chain_id!r}, turn {turn.name!r}: the context has no token.')
    needed = len(turn.context) + turn.sampling.max_tokens
    if needed > self.length:
      raise ValueError(
        f'chain {chain_id!r}, turn {turn.name!r}: a context of {len(turn.context)} tokens and up '
        f'to {turn.sampling.max_tokens} sampled ones do not fit a cache of {self.length}.'
      )
    if len(self._turn_stops(turn)[0]) > MAX_STOP_TOKENS:
      raise ValueError(f'turn {turn.name!r}: more than {MAX_STOP_TOKENS} stop tokens.')


def longest_context(chain: Chain) -> int:
  """Tokens of the longest context and reply that a chain can come to, found without a model.

  The chain is run on replies of their full length, so it must not branch on what a reply says. A
  reply that is passed to a model with another tokenizer is taken to keep its number of tokens.
  """
  longest, completion = 0, None
  while True:
    try:
      turn = chain.send(completion)
    except StopIteration:
      return longest
    count = turn.sampling.max_tokens
    longest = max(longest, len(turn.context) + count)
    text = ' a' * count  # what another model is shown of it: about as many tokens
    completion = Completion([turn.context[-1]] * count, text, [0.0] * count, 'length')


def _common_prefix(a: list[int], b: list[int]) -> int:
  """Number of leading tokens that two sequences share."""
  if a == b[: len(a)]:
    return len(a)
  return next(
    (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
  )


def _decode(tokenizer, tokens: list[int]) -> str:
  return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _first_stop_text(
  tokenizer, tokens: list[int], texts: tuple[str, ...]
) -> tuple[int, str] | None:
  """(tokens up to the one that completes a stop text first, text before it), or None."""
  if not texts:
    return None
  whole = _decode(tokenizer, tokens)
  if not any(stop in whole for stop in texts):
    return None
  for count in range(1, len(tokens) + 1):
    text = _decode(tokenizer, tokens[:count])
    places = [text.find(stop) for stop in texts if stop in text]
    if places:
      return count, text[: min(places)]
  return None
