"""The engine, which runs many chains of turns at once in a fixed number of slots.

A chain keeps its slot, in every model, from its first turn to its last. When a turn ends, the
engine asks the chain for its next turn at once. It prefills only tokens that the slot's cache does
not hold, and prefills shared prefixes once. How many tokens are reused depends on the chain alone,
never on what the slot held before. With the same sizes and devices, a chain therefore gives the
same bits alone, in a full batch, and after a restart.

A model may be split over several processes. Each of them then runs the same chains in an engine of
its own, in lock step: no decision depends on a clock or on what one process alone sees.
"""

import concurrent.futures
import hashlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np

from cai_jax.model.lm import LM
from cai_jax.runtime import interruption
from cai_jax.runtime.errors import SampledError, UserError
from cai_jax.runtime.replicas import LockStep, replica_of
from cai_jax.sampling.active import ActiveChain, Run
from cai_jax.sampling.auto import resolve_for
from cai_jax.sampling.checks import check_models
from cai_jax.sampling.config import EngineConfig
from cai_jax.sampling.journal import Journal, check_sampler, digest
from cai_jax.sampling.prefixes import SharedPrefixes, prefix_capacity
from cai_jax.sampling.remote import Remote
from cai_jax.sampling.slots import LocalModel
from cai_jax.sampling.stats import COMPILATIONS, Stats
from cai_jax.sampling.text import decode, find_stop_text, round_logprobs
from cai_jax.sampling.types import MAX_STOP_TOKENS, Chain, Completion, Turn

DEFERRED = object()  # the result of a chain that waits for a batch; a later start continues it
MAX_WAIT = 1.0  # seconds of waiting for a server between two looks for a signal
Stops = tuple[tuple[int, ...], tuple[str, ...]]  # token ids and texts that end a reply


def turn_key(seed: int, chain_id: str, turn: str) -> np.ndarray:
  """Return a turn's random key, u32[2], as a hash of the arguments.

  Args:
    seed: seed of the run.
    chain_id: id of the chain.
    turn: name of the turn.
  """
  text = f'{seed}\0{chain_id}\0{turn}'.encode()
  return np.frombuffer(hashlib.blake2b(text, digest_size=8).digest(), np.uint32)


class Engine:
  """An engine that runs chains in the slots of one or more models.

  Args:
    models: models in memory or behind servers, by the names that `Turn.model` uses.
    length: number of tokens of a slot's cache: the maximum length of a context and its reply,
      without the shared prefix.
    seed: seed of all sampling.
    config: sizes of the compiled programs; 'auto' takes what suits the models and their devices.
    journal: where finished turns are stored and looked up; None disables it.
    stops: for each model, the token ids and texts that end all of its replies.
    prefixes: for each model, the token ids of the prefixes that many contexts share. They are
      prefilled once, and all slots attend to them. They change results by rounding at most.

  Attributes:
    stats: counters of all runs.
    slots: number of slots.
    lock_step: keeps the processes that share the models together.

  Raises:
    UserError: if `length` exceeds a model's context, the caches exceed the memory budget, or the
      journal holds turns of another sampler.
    ValueError: if `stops` or `prefixes` do not fit the models.
  """

  def __init__(
    self,
    models: Mapping[str, LM | Remote],
    *,
    length: int,
    seed: int,
    config: EngineConfig = EngineConfig(),  # noqa: B008 (frozen)
    journal: Journal | None = None,
    stops: Mapping[str, Stops] | None = None,
    prefixes: SharedPrefixes | None = None,
  ):
    self._updated = time.perf_counter(), COMPILATIONS.count  # at the last update of the stats
    self.stats = Stats()
    self.seed, self.journal, self.length = seed, journal, length
    self.models = dict(models)
    check_models(self.models, length, stops or {}, prefixes or {})
    self._stops = {name: ((), ()) for name in models} | dict(stops or {})
    local = {name: model for name, model in models.items() if isinstance(model, LM)}
    self.lock_step = LockStep(replica_of(next((lm.mesh for lm in local.values()), None)))
    if local and journal is not None:  # what servers replied does not depend on our sampler
      check_sampler(journal.folder)
    shared = {name: [list(p) for p in (prefixes or {}).get(name, ())] for name in local}
    tokens = [prefix_capacity(p) * len(p) for p in shared.values()]
    config = resolve_for(config, list(local.values()))
    self.slots, share = config.slots, 1.0
    if local:
      self.slots, share = config.fit(list(local.values()), length, tokens)
    self._local = {
      name: LocalModel(lm, self.slots, length, share, shared[name], config, self.stats)
      for name, lm in local.items()
    }
    self.stats.slots, self.stats.most_slots = self.slots, config.slots
    self._update_clock()

  def run(
    self,
    chains: Iterable[tuple[str, Chain] | None],
    before_burst: Callable[[], Collection[Chain]] = tuple,
  ) -> Iterator[tuple[str, Any]]:
    """Run chains and yield the result of each as it finishes.

    The engine takes a chain from the iterable when a slot becomes free, so neither the chains nor
    their results need to fit in memory.

    Args:
      chains: (id, chain) pairs; ids are unique. None says that no chain is ready yet: the engine
        asks again after the next burst, and ends the run if no chain is active.
      before_burst: is called before each burst. The chains that it returns are dropped: they are
        closed, and have no result.

    Yields:
      (id, result) pairs, in the order in which the chains finish. The result is `DEFERRED` if a
      turn waits for the answer of a batch.

    Raises:
      UserError: if a turn does not fit into the cache or names an unknown model, if a model
        produces NaN, or if a server refuses a request.
      UnreachableError: if a server fails after all retries. The journal contains all answers of
        servers.
    """
    self._updated = time.perf_counter(), COMPILATIONS.count
    run = Run(iter(chains), self.slots)
    for model in self._local.values():
      model.reset()
    if self.journal is not None:
      self.journal.refresh()  # makes turns visible that were stored after it was opened
    try:
      yield from self._advance(run, [])
      host_seconds = 0.0
      while run.active:
        interruption.check()
        if dropped := before_burst():
          self._drop(run, dropped)
          yield from self._advance(run, [])
        for model in self._local.values():
          model.dispatch()
        steps = self.stats.decode_steps
        ended = self._collect(run.active)
        if self.stats.decode_steps > steps:
          self.lock_step.check()
        for model in self._local.values():
          model.dispatch_ahead(host_seconds, bool(ended))
        start = time.perf_counter()
        yield from self._advance(run, ended)
        host_seconds = time.perf_counter() - start
        yield from self._advance(run, self._collect(run.active))
        self._update_clock()
      self.lock_step.finish()
    finally:
      self._update_clock()
      for entry in run.active.values():
        if entry.future is not None:
          entry.future.cancel()

  def _advance(
    self, run: Run, ended: Iterable[tuple[ActiveChain, Completion]]
  ) -> Iterator[tuple[str, Any]]:
    """Resume chains whose turn ended, and start new chains in the slots that become free."""
    for entry, completion in ended:
      if not self._resume(entry, completion):
        run.end(entry)
        yield self._finish(entry)
    while run.free and (item := next(run.source, None)) is not None:
      entry, number = ActiveChain(*item, slot=run.free[-1]), next(run.numbers)
      for model in self._local.values():
        model.start(entry.slot, number)
      if self._resume(entry, None):
        run.active[run.free.pop()] = entry
      else:
        yield self._finish(entry)

  def _drop(self, run: Run, chains: Collection[Chain]) -> None:
    """Close chains before they finish. As after a kill, the journal gets nothing of them."""
    for entry in [entry for entry in run.active.values() if entry.chain in chains]:
      entry.chain.close()
      if entry.future is not None:
        entry.future.cancel()
      for model in self._local.values():
        model.drop(entry.slot)
      run.end(entry)

  def expert_usage(self) -> dict[str, np.ndarray]:
    """Return how many tokens each expert of the models in memory has computed, i64[L,E] by name.

    Dense models are left out. L counts the layers that are mixtures of experts.
    """
    mixtures = {name: model for name, model in self._local.items() if model.lm.config.experts}
    return {name: model.expert_usage() for name, model in mixtures.items()}

  def _update_clock(self) -> None:
    """Add the seconds and compilations since the last update to the stats."""
    now, compilations = time.perf_counter(), COMPILATIONS.count
    self.stats.seconds += now - self._updated[0]
    self.stats.compilations += compilations - self._updated[1]
    self._updated = now, compilations

  def _collect(self, active: dict[int, ActiveChain]) -> list[tuple[ActiveChain, Completion]]:
    """Wait for the dispatched bursts; return the chains whose turn ended, and its completion."""
    ended = []
    for name, model in self._local.items():
      burst = model.collect()
      if burst is None:
        continue
      for slot in map(int, np.flatnonzero(burst.num_sampled)):
        entry, count = active[slot], burst.num_sampled[slot]
        entry.tokens += burst.tokens[slot, :count].tolist()
        entry.logprobs += burst.logprobs[slot, :count].tolist()
        stop_texts, num_checked = self._stops_of(entry.turn)[1], len(entry.tokens) - count
        tokenizer = self.models[name].tokenizer
        cut = find_stop_text(tokenizer, entry.tokens, stop_texts, num_checked)
        if cut is not None or not burst.active[slot]:
          ended.append((entry, self._complete(entry, cut)))
    return ended + self._collect_remote(active, wait=not ended)

  def _collect_remote(
    self, active: dict[int, ActiveChain], wait: bool
  ) -> list[tuple[ActiveChain, Completion]]:
    """Return the chains whose turn a server has sampled, and its completion.

    Args:
      active: the active chains, by slot.
      wait: whether to wait for one, for `MAX_WAIT` at most, if no model in memory has work to do.
    """
    pending = {entry.future: entry for entry in active.values() if entry.future is not None}
    if not pending:
      return []
    begin = time.perf_counter()
    busy = any(model.busy for model in self._local.values())
    seconds = MAX_WAIT if wait and not busy else 0
    concurrent.futures.wait(pending, seconds, concurrent.futures.FIRST_COMPLETED)
    self.stats.remote_seconds += time.perf_counter() - begin
    done = [(entry, future) for future, entry in pending.items() if future.done()]
    # Store answers at once, even if their chain never finishes: asked again, a server may give
    # another answer.
    answered = [(entry, future) for entry, future in done if future.exception() is None]
    for entry, future in answered:
      entry.future = None
      if self.journal is not None:
        self.journal.put([(entry.digest, future.result())])
    for _, future in done:
      future.result()  # raises the exception of the first request that failed
    return [(entry, self._count(future.result())) for entry, future in answered]

  def _resume(self, entry: ActiveChain, completion: Completion | None) -> bool:
    """Send a chain its completion and submit its next turn; return False if it has finished.

    Turns that are in the journal are answered at once. A turn that cannot be sampled is raised in
    the chain, which may end there in order. A chain whose turn waits for a batch counts as
    finished, with the result `DEFERRED`.
    """
    refusal: UserError | None = None
    while True:
      try:
        if refusal is not None:
          turn = entry.chain.throw(refusal)
        else:
          turn = entry.chain.send(completion)  # type: ignore[arg-type]  # None starts it
      except StopIteration as stop:
        entry.result = stop.value
        return False
      try:
        self._check_turn(entry.id, turn)
        refusal = None
      except UserError as error:
        refusal = error
        continue
      stop_token_ids, stop_texts = self._stops_of(turn)
      key = turn_key(self.seed, entry.id, turn.name)
      model = self.models[turn.model]
      entry.digest = digest(
        model.fingerprint,
        turn.context,
        turn.sampling,
        (stop_token_ids, stop_texts),
        key.tobytes(),
        self._local[turn.model].sampler if turn.model in self._local else '',
        turn.messages,
      )
      completion = None
      if self.journal is not None:
        is_local = turn.model in self._local
        completion = self.journal.get(entry.digest, model.vocab_size, finite=is_local)
      if completion is not None:
        self.stats.replayed_turns += 1
        continue
      entry.turn, entry.tokens, entry.logprobs = turn, [], []
      if turn.model in self._local:
        self._local[turn.model].submit(entry.slot, turn, key, stop_token_ids)
      else:
        remote = cast(Remote, model)
        entry.future = remote.submit(turn, key, stop_token_ids, stop_texts, entry.id, entry.digest)
        if entry.future is None:
          entry.chain.close()
          entry.result = DEFERRED
          return False
      return True

  def _complete(self, entry: ActiveChain, cut: tuple[int, str] | None) -> Completion:
    """Return the completion of a turn that ended here.

    Args:
      entry: the chain.
      cut: tokens and text up to the stop text that ended the reply, if one did.
    """
    turn, tokens = entry.turn, entry.tokens
    tokenizer = self.models[turn.model].tokenizer
    if cut is not None:
      tokens, text, reason = tokens[: cut[0]], cut[1], 'stop_text'
    elif tokens[-1] in self._stops_of(turn)[0]:
      text, reason = decode(tokenizer, tokens[:-1]), 'stop'
    else:
      text, reason = decode(tokenizer, tokens), 'length'
    # How far the reply was decoded beyond a stop text depends on the end of the burst, and so on
    # other chains. Those tokens must not be reused.
    kept = len(turn.context) + len(tokens) - 1
    self._local[turn.model].stop(entry.slot, kept, exact=cut is None)
    logprobs = round_logprobs(entry.logprobs[: len(tokens)])
    completion = Completion(tokens, text, logprobs, reason)
    entry.finished.append((entry.digest, completion))
    return self._count(completion)

  def _count(self, completion: Completion) -> Completion:
    """Add a sampled turn to the stats and return it."""
    self.stats.turns += 1
    self.stats.sampled_tokens += len(completion.tokens)
    return completion

  def _finish(self, entry: ActiveChain) -> tuple[str, Any]:
    """Store a finished chain's turns, clear its slot, and return its id and result.

    All turns of a chain that were sampled here enter the journal together. An unfinished chain that
    was killed then restarts from what an earlier run had finished, and computes the same bits as
    one that was never killed.
    """
    journal = self.journal
    if journal is not None and entry.finished:
      self.lock_step.lead(lambda: journal.put(entry.finished))
    for model in self._local.values():
      model.clear(entry.slot)
    self.stats.chains += 1
    return entry.id, entry.result

  def _stops_of(self, turn: Turn) -> Stops:
    """Return the stop tokens and stop texts of a turn: its model's, then its own."""
    tokens, texts = self._stops[turn.model]
    tokens = tuple(dict.fromkeys((*tokens, *turn.sampling.stop_token_ids)))
    return tokens, tuple(dict.fromkeys((*texts, *turn.sampling.stop)))

  def _check_turn(self, chain_id: str, turn: Turn) -> None:
    """Raise SampledError if a turn cannot be sampled."""
    where = f'chain {chain_id!r}, turn {turn.name!r}'
    if turn.model not in self.models:
      raise SampledError(
        f'{where}: there is no model {turn.model!r}. Use one of {", ".join(self.models)}.'
      )
    if not turn.context:
      raise SampledError(f'{where}: the context is empty. It must have at least one token.')
    if len(self._stops_of(turn)[0]) > MAX_STOP_TOKENS:
      raise SampledError(
        f'{where}: {len(self._stops_of(turn)[0])} stop tokens are too many. Use at most '
        f'{MAX_STOP_TOKENS}, including those of the model.'
      )
    if turn.model not in self._local:
      cast(Remote, self.models[turn.model]).check_turn(turn)
      return
    model = self._local[turn.model]
    turn.sampling.check_vocabulary(model.lm.vocab_size, where)
    needed = len(turn.context) + turn.sampling.max_tokens
    shared, limit = model.prefix_of(turn.context)[1], model.lm.config.max_positions
    if needed - shared > self.length or needed > limit:
      raise SampledError(
        f'{where}: a context of {len(turn.context)} tokens and a reply of up to '
        f'{turn.sampling.max_tokens} do not fit into a cache of {self.length} tokens (after a '
        f'shared prefix of {shared}) or the {limit} positions of {model.lm.name}. Increase '
        'engine.spare_tokens, or shorten prompts or max_tokens.'
      )
