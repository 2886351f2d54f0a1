"""The engine: many chains of turns over a fixed number of slots, each slot with a live KV cache.

A slot belongs to one chain from its first turn to its last, in every model. When a turn ends, the
chain is asked for its next one at once; only the tokens that its cache does not hold are prefilled,
and those of a shared prefix are never prefilled again. How much is reused depends on the chain
alone, never on what the slot held before, so that with the same sizes and devices a chain gives the
same bits alone, in a full batch, and after a restart.
"""

import concurrent.futures
import dataclasses
import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cai_jax.model.lm import LM
from cai_jax.runtime.errors import UserError
from cai_jax.sampling.journal import Journal, digest
from cai_jax.sampling.remote.client import Remote
from cai_jax.sampling.slots import (
  COMPILED,
  EngineConfig,
  LocalModel,
  Stats,
  match_prefix,
  prefix_room,
)
from cai_jax.sampling.text import decode, first_stop_text, rounded
from cai_jax.sampling.types import MAX_STOP_TOKENS, Chain, Completion, Turn

Prefixes = Mapping[str, Sequence[Sequence[int]]]  # by model: token ids that contexts begin with


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
  future: concurrent.futures.Future | None = None  # where another server samples the turn
  tokens: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)
  finished: list[tuple[str, Completion]] = dataclasses.field(default_factory=list)
  result: Any = None


class Engine:
  """Runs chains over the slots of one or several models.

  Args:
    models: by the name that `Turn.model` uses; in memory here, or served elsewhere.
    length: tokens that a slot's cache holds: no chain's context and reply may be longer, shared
      prefix not counted.
    seed: of all sampling.
    config: sizes of the compiled programs.
    journal: where finished turns are kept and looked up; None keeps nothing.
    stops: for each model, token ids and texts that end each of its replies (a dialogue's own).
    prefixes: for each model, token ids that many contexts begin with. They are prefilled once and
      attended to by all rows. Texts are the same with and without, logits to rounding.

  Raises:
    ValueError: if a model's context is shorter than `length`, or the caches do not fit the budget.
  """

  def __init__(
    self,
    models: Mapping[str, LM | Remote],
    *,
    length: int,
    seed: int,
    config: EngineConfig = EngineConfig(),  # noqa: B008 (frozen)
    journal: Journal | None = None,
    stops: Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]] | None = None,
    prefixes: Prefixes | None = None,
  ):
    self._since = time.perf_counter(), COMPILED.count  # when the stats were last brought up to date
    self.stats = Stats()
    self.seed, self.journal, self.length = seed, journal, length
    self.models = dict(models)
    self._stops = {name: ((), ()) for name in models} | dict(stops or {})
    local = {name: model for name, model in models.items() if isinstance(model, LM)}
    for lm in local.values():
      if length > lm.config.max_positions:
        raise UserError(
          f'a context of {length} tokens is longer than the {lm.config.max_positions} that '
          f'{lm.name} was made for; shorten prompts, max_tokens or the number of rounds.'
        )
    for name, _ in (*(prefixes or {}).items(), *(stops or {}).items()):
      if name not in models:
        raise UserError(f'prefixes or stops for {name!r}; the models are {", ".join(models)}.')
      for prefix in (prefixes or {}).get(name, ()):
        if not 0 < len(prefix) < models[name].max_positions:
          raise UserError(
            f'a shared prefix of {len(prefix)} tokens for {name!r}; it must have at least one, and '
            f'leave room in the {models[name].max_positions} of its context.'
          )
    shared = {name: [list(p) for p in (prefixes or {}).get(name, ())] for name in local}
    tokens = [prefix_room(p) * len(p) for p in shared.values()]
    self.slots = config.fit(list(local.values()), length, tokens) if local else config.slots
    self._local = {
      name: LocalModel(lm, self.slots, length, shared[name], config, self.stats)
      for name, lm in local.items()
    }
    self.stats.slots, self.stats.most_slots = self.slots, config.slots
    self._clock()

  def run(self, chains: Iterable[tuple[str, Chain]]) -> Iterator[tuple[str, Any]]:
    """(id, result) of each chain, as they finish.

    Chains are taken from the iterable when a slot is free, so neither they nor their results need
    to fit in memory.

    Raises:
      ValueError: if a turn does not fit the cache, or names a model that is not there; if a model
        gives no number (NaN).
      ConnectionError: if a server has failed for good. What it and others have answered is in the
        journal.
    """
    self._since = time.perf_counter(), COMPILED.count
    source, active = iter(chains), {}
    free = list(range(self.slots))[::-1]
    for model in self._local.values():
      model.reset()
    if self.journal is not None:
      self.journal.refresh()  # what has been put since it was opened

    def turn_over(ended: list[tuple[_Active, Completion]]) -> Iterator[tuple[str, Any]]:
      """Gives chains the replies they waited for, and their slots to others where they end."""
      for entry, completion in ended:
        if not self._advance(entry, completion):
          free.append(entry.slot)
          del active[entry.slot]
          yield self._finish(entry)
      while free and (item := next(source, None)) is not None:
        entry = _Active(*item, slot=free[-1])
        if self._advance(entry, None):
          active[free.pop()] = entry
        else:
          yield self._finish(entry)

    try:
      yield from turn_over([])
      host_seconds = 0.0
      while active:
        for model in self._local.values():
          model.prefill()
        for model in self._local.values():
          model.dispatch()
        ended = self._collect(active)
        for model in self._local.values():
          # The device goes on with the other slots for about as long as the host will be busy.
          model.dispatch(int(host_seconds / max(model.step_seconds, 1e-9)))
        start = time.perf_counter()
        yield from turn_over(ended)
        host_seconds = time.perf_counter() - start
        yield from turn_over(self._collect(active))
        self._clock()
    finally:
      self._clock()
      for entry in active.values():
        if entry.future is not None:
          entry.future.cancel()

  def _clock(self) -> None:
    """Brings the stats' seconds and compilations up to now."""
    now, compiled = time.perf_counter(), COMPILED.count
    self.stats.seconds += now - self._since[0]
    self.stats.compilations += compiled - self._since[1]
    self._since = now, compiled

  def _collect(self, active: dict[int, _Active]) -> list[tuple[_Active, Completion]]:
    """The chains whose turn has ended, with its completion, once the bursts under way are over."""
    ended = []
    for name, model in self._local.items():
      burst = model.collect()
      if burst is None:
        continue
      for slot in map(int, np.flatnonzero(burst.count)):
        entry, count = active[slot], burst.count[slot]
        entry.tokens += burst.tokens[slot, :count].tolist()
        entry.logprobs += burst.logprobs[slot, :count].tolist()
        texts, clean = self._stops_of(entry.turn)[1], len(entry.tokens) - count
        cut = first_stop_text(self.models[name].tokenizer, entry.tokens, texts, clean)
        if cut is not None or not burst.active[slot]:
          ended.append((entry, self._complete(entry, cut)))
    return ended + self._served(active, wait=not ended)

  def _served(self, active: dict[int, _Active], wait: bool) -> list[tuple[_Active, Completion]]:
    """The chains whose turn another server has sampled; waits where nothing else is to be done."""
    asked = {entry.future: entry for entry in active.values() if entry.future is not None}
    if not asked:
      return []
    begin = time.perf_counter()
    busy = any(model.busy for model in self._local.values())
    concurrent.futures.wait(
      asked, None if wait and not busy else 0, concurrent.futures.FIRST_COMPLETED
    )
    self.stats.remote_seconds += time.perf_counter() - begin
    done = [(entry, future) for future, entry in asked.items() if future.done()]
    # Kept at once, whatever becomes of the chain: a server may not say the same again.
    found = [(entry, future) for entry, future in done if future.exception() is None]
    for entry, future in found:
      entry.future = None
      if self.journal is not None:
        self.journal.put([(entry.digest, future.result())])
    for _, future in done:
      future.result()  # raises what went wrong with the first that did
    return [(entry, self._counted(future.result())) for entry, future in found]

  def _advance(self, entry: _Active, completion: Completion | None) -> bool:
    """Sends a chain its completion until it wants a turn sampled; False when it is finished."""
    while True:
      try:
        turn = entry.chain.send(completion)
      except StopIteration as stop:
        entry.result = stop.value
        return False
      self._check(entry.id, turn)
      tokens, texts = self._stops_of(turn)
      key = turn_key(self.seed, entry.id, turn.name)
      model = self.models[turn.model]
      entry.digest = digest(
        model.fingerprint, turn.context, turn.sampling, (tokens, texts), key.tobytes()
      )
      completion = None if self.journal is None else self.journal.get(entry.digest)
      if completion is not None:
        self.stats.replayed_turns += 1
        continue
      entry.turn, entry.tokens, entry.logprobs = turn, [], []
      if turn.model in self._local:
        self._local[turn.model].submit(entry.slot, turn, key, tokens)
      else:
        entry.future = model.submit(turn, key, tokens, texts, entry.id)
      return True

  def _complete(self, entry: _Active, cut: tuple[int, str] | None) -> Completion:
    """The completion of a turn that has ended here, by a stop text if there is a `cut`."""
    turn, tokens = entry.turn, entry.tokens
    tokenizer = self.models[turn.model].tokenizer
    if cut is not None:
      tokens, text, reason = tokens[: cut[0]], cut[1], 'stop_text'
    elif tokens[-1] in self._stops_of(turn)[0]:
      text, reason = decode(tokenizer, tokens[:-1]), 'stop'
    else:
      text, reason = decode(tokenizer, tokens), 'length'
    # What was decoded beyond a stop text hangs on where the burst ended, and so on other chains.
    self._local[turn.model].stop(entry.slot, len(turn.context) + len(tokens) - 1)
    completion = Completion(tokens, text, rounded(entry.logprobs[: len(tokens)]), reason)
    entry.finished.append((entry.digest, completion))
    return self._counted(completion)

  def _counted(self, completion: Completion) -> Completion:
    self.stats.turns += 1
    self.stats.sampled_tokens += len(completion.tokens)
    return completion

  def _finish(self, entry: _Active) -> tuple[str, Any]:
    """Journals a finished chain's turns and frees what its slots held; (id, result).

    All turns of a chain that were sampled here enter the journal together. After a kill an
    unfinished chain then starts from what an earlier run had finished, and so computes the same
    bits as one never killed.
    """
    if self.journal is not None and entry.finished:
      self.journal.put(entry.finished)
    for model in self._local.values():
      model.clear(entry.slot)
    self.stats.chains += 1
    return entry.id, entry.result

  def _stops_of(self, turn: Turn) -> tuple[tuple[int, ...], tuple[str, ...]]:
    tokens, texts = self._stops[turn.model]
    tokens = tuple(dict.fromkeys((*tokens, *turn.sampling.stop_token_ids)))
    return tokens, tuple(dict.fromkeys((*texts, *turn.sampling.stop)))

  def _check(self, chain_id: str, turn: Turn) -> None:
    where = f'chain {chain_id!r}, turn {turn.name!r}'
    if turn.model not in self.models:
      raise UserError(f'{where}: no model {turn.model!r}; there is {", ".join(self.models)}.')
    if not turn.context:
      raise UserError(f'{where}: the context has no token.')
    if len(self._stops_of(turn)[0]) > MAX_STOP_TOKENS:
      raise UserError(f'{where}: more than {MAX_STOP_TOKENS} stop tokens.')
    if turn.model not in self._local:
      return
    model = self._local[turn.model]
    needed = len(turn.context) + turn.sampling.max_tokens
    shared, limit = model.prefix_of(turn.context)[1], model.lm.config.max_positions
    if needed - shared > self.length or needed > limit:
      raise UserError(
        f'{where}: a context of {len(turn.context)} tokens and up to {turn.sampling.max_tokens} '
        f'sampled ones do not fit a cache of {self.length} after a shared prefix of {shared}, or '
        f'the {limit} tokens of {model.lm.name}. A longer cache is had with engine.spare_tokens.'
      )


def longest_context(chain: Chain, prefixes: Prefixes | None = None) -> dict[str, tuple[int, int]]:
  """For each model, tokens of the longest context and reply that a chain can come to.

  The second number is that without the shared prefix that the context begins with: what a slot's
  cache has to hold. The chain is run without a model, on replies of their full length, so it must
  not branch on what a reply says. A reply that is passed to a model with another tokenizer is
  taken to keep its number of tokens.
  """
  longest: dict[str, tuple[int, int]] = {}
  completion = None
  while True:
    try:
      turn = chain.send(completion)
    except StopIteration:
      return longest
    count = turn.sampling.max_tokens
    whole, own = longest.get(turn.model, (0, 0))
    needed = len(turn.context) + count
    shared = match_prefix((prefixes or {}).get(turn.model, ()), turn.context)[1]
    longest[turn.model] = max(whole, needed), max(own, needed - shared)
    text = ' a' * count  # what another model is shown of it: about as many tokens
    completion = Completion([turn.context[-1]] * count, text, [0.0] * count, 'length')
