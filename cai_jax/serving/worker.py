"""The thread that owns the devices: it samples and scores for all requests at once.

Threads of requests hand it turns and rows and wait for futures. Turns join the engine between two
of its bursts, where a slot is free, so that concurrent requests share its steps. One batch of rows
is scored before each burst, so neither waits for the other to end. A future that is cancelled takes
no more time: its turn or row is dropped.
"""

import collections
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from cai_jax.model.lm import LM
from cai_jax.runtime.errors import UserError
from cai_jax.sampling.engine import Engine
from cai_jax.sampling.types import Chain, Completion, Turn
from cai_jax.scoring.positions import Scored, score_tokens

# Of a batch of rows, so that no one waits long for the requests of others. A row may be longer.
MOST_ROWS, MOST_TOKENS = 64, 8192
POLL_SECONDS = 0.2  # between two looks for a signal while nothing is asked


class _Asked(NamedTuple):
  """A reply to sample. Its randomness is a function of the id."""

  id: str
  turn: Turn
  future: concurrent.futures.Future[Completion]


class _Row(NamedTuple):
  """Tokens to score."""

  tokens: Sequence[int]
  alternatives: int
  future: concurrent.futures.Future[Scored]


class Worker:
  """A queue of replies to sample and rows to score, and the loop that works on them.

  Args:
    lm: the model.
    engine: an engine with this model, named 'base'.

  Attributes:
    lm: the model.
    length: number of tokens of a slot's cache.
  """

  def __init__(self, lm: LM, engine: Engine):
    self.lm, self.length, self._engine = lm, engine.length, engine
    self._turns: collections.deque[_Asked] = collections.deque()
    self._rows: collections.deque[_Row] = collections.deque()
    self._chains: dict[concurrent.futures.Future, Chain] = {}  # that the engine runs
    self._scoring: list[concurrent.futures.Future] = []
    self._failure: BaseException | None = None
    self._changed = threading.Condition()

  def sample(self, name: str, turn: Turn) -> concurrent.futures.Future[Completion]:
    """Ask for a reply.

    Args:
      name: determines the reply together with the turn. Two turns of one name share randomness.
      turn: its context and settings.

    Returns:
      The completion. It raises UserError if the turn cannot be sampled.
    """
    asked = _Asked(name, turn, concurrent.futures.Future())
    self._add(self._turns, asked)
    return asked.future

  def score(self, tokens: Sequence[int], alternatives: int) -> concurrent.futures.Future[Scored]:
    """Ask for the log-probabilities of tokens.

    Args:
      tokens: at least one token.
      alternatives: number of most likely tokens at each position, see `score_tokens`.

    Returns:
      The log-probabilities. It raises UserError if the row cannot be scored.
    """
    row = _Row(tokens, alternatives, concurrent.futures.Future())
    self._add(self._rows, row)
    return row.future

  def _add(self, queue: collections.deque, item: _Asked | _Row) -> None:
    with self._changed:
      if self._failure is not None:
        raise RuntimeError('the worker has ended') from self._failure
      queue.append(item)
      self._changed.notify()

  def run(self, is_over: Callable[[], bool]) -> None:
    """Work until `is_over` returns True, which is asked only while nothing waits.

    Args:
      is_over: whether no request is left and no other will come.
    """
    try:
      while self._wait() or not is_over():
        if self._turns:
          self._sample_waiting()
        else:
          self._score_batch()
    except BaseException as error:
      with self._changed:
        self._failure = error
      lost = [*self._chains, *self._scoring, *(asked.future for asked in self._turns)]
      lost += [row.future for row in self._rows]
      _fail(lost, RuntimeError(f'the worker has ended: {error!r}'))
      raise

  def _wait(self) -> bool:
    """Wait a moment until something is asked; return whether something is."""
    with self._changed:
      return self._changed.wait_for(lambda: bool(self._turns or self._rows), POLL_SECONDS)

  def _score_batch(self) -> None:
    """Score a batch of the rows that wait, those of the first requests first."""
    rows = self._take_rows()
    self._scoring = [row.future for row in rows]
    for alternatives in sorted({row.alternatives for row in rows}):
      group = [row for row in rows if row.alternatives == alternatives]
      try:
        results = score_tokens(self.lm, [row.tokens for row in group], alternatives)
      except UserError as error:
        _fail([row.future for row in group], error)
        continue
      for row, result in zip(group, results, strict=True):
        _finish(row.future, result)
    self._scoring = []

  def _take_rows(self) -> list[_Row]:
    """Take the rows of a batch from the queue; none if none waits."""
    rows: list[_Row] = []
    tokens = 0
    while self._rows and len(rows) < MOST_ROWS:
      if rows and tokens + len(self._rows[0].tokens) > MOST_TOKENS:
        break
      row = self._rows.popleft()
      if not row.future.cancelled():
        rows.append(row)
        tokens += len(row.tokens)
    return rows

  def _sample_waiting(self) -> None:
    """Run the engine until no turn is left."""
    try:
      for _ in self._engine.run(self._arrivals(), self._before_burst):
        pass
    except UserError as error:  # of the whole run, such as logits that are not finite
      _fail(list(self._chains), error)
    self._chains.clear()

  def _before_burst(self) -> list[Chain]:
    """Score a batch of rows, and return the chains of the turns that were cancelled."""
    self._score_batch()
    cancelled = [future for future in self._chains if future.cancelled()]
    return [self._chains.pop(future) for future in cancelled]

  def _arrivals(self) -> Iterator[tuple[str, Chain] | None]:
    """Yield the chains of turns as they arrive, and None where none waits."""
    while True:
      asked = self._turns.popleft() if self._turns else None
      if asked is None:
        yield None
      elif not asked.future.cancelled():
        self._chains[asked.future] = self._chain(asked)
        yield asked.id, self._chains[asked.future]

  def _chain(self, asked: _Asked) -> Chain:
    """Sample one turn and set its future."""
    try:
      completion = yield asked.turn
    except UserError as error:  # the turn does not fit
      _fail([asked.future], error)
    else:
      _finish(asked.future, completion)
    self._chains.pop(asked.future, None)


def _finish(future: concurrent.futures.Future, result: Any) -> None:
  """Set the result of a future, unless it is cancelled."""
  with contextlib.suppress(concurrent.futures.InvalidStateError):
    future.set_result(result)


def _fail(futures: Sequence[concurrent.futures.Future], error: Exception) -> None:
  """Set an error for what cannot be computed, unless it is done or cancelled."""
  for future in futures:
    with contextlib.suppress(concurrent.futures.InvalidStateError):
      future.set_exception(error)
