"""The thread that owns the devices: it samples and scores for all requests at once.

Threads of requests hand it turns and rows and wait for futures. Turns join the engine between two
of its bursts, where a slot is free, so that concurrent requests share its steps. Rows that wait
are scored in one batch.
"""

import collections
import concurrent.futures
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from cai_jax.model.lm import LM
from cai_jax.runtime.errors import UserError
from cai_jax.sampling.engine import Engine
from cai_jax.sampling.types import Chain, Completion, Turn
from cai_jax.scoring.positions import Scored, score_tokens

MOST_ROWS = 64  # scored together, so that no one waits long for the requests of others
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
    self._running: set[concurrent.futures.Future] = set()
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
        self._score_waiting()
        if self._turns:
          self._sample_waiting()
    except BaseException as error:
      with self._changed:
        self._failure = error
      lost = [*self._running, *(item.future for item in self._turns)]
      lost += [row.future for row in self._rows]
      self._fail(lost, RuntimeError(f'the worker has ended: {error!r}'))
      raise

  def _wait(self) -> bool:
    """Wait a moment until something is asked; return whether something is."""
    with self._changed:
      return self._changed.wait_for(lambda: bool(self._turns or self._rows), POLL_SECONDS)

  def _score_waiting(self) -> None:
    """Score the rows that wait, `MOST_ROWS` at a time."""
    while self._rows:
      rows = [self._rows.popleft() for _ in range(min(len(self._rows), MOST_ROWS))]
      for alternatives in sorted({row.alternatives for row in rows}):
        group = [row for row in rows if row.alternatives == alternatives]
        self._running |= {row.future for row in group}
        try:
          results = score_tokens(self.lm, [row.tokens for row in group], alternatives)
        except UserError as error:
          self._fail([row.future for row in group], error)
          continue
        for row, result in zip(group, results, strict=True):
          self._running.discard(row.future)
          row.future.set_result(result)

  def _sample_waiting(self) -> None:
    """Run the engine until no turn is left."""
    try:
      for _ in self._engine.run(self._arrivals()):
        pass
    except UserError as error:  # of the whole run, such as logits that are not finite
      self._fail(list(self._running), error)

  def _arrivals(self) -> Iterator[tuple[str, Chain] | None]:
    """Yield the chains of turns as they arrive, and None where none waits.

    The engine asks between its bursts. Rows are scored then, too, so that they do not wait for long
    replies of others.
    """
    while True:
      self._score_waiting()
      asked = self._turns.popleft() if self._turns else None
      if asked is None:
        yield None
      else:
        self._running.add(asked.future)
        yield asked.id, self._chain(asked)

  def _chain(self, asked: _Asked) -> Chain:
    """Sample one turn and set its future."""
    try:
      completion = yield asked.turn
    except UserError as error:  # the turn does not fit
      asked.future.set_exception(error)
    else:
      asked.future.set_result(completion)
    self._running.discard(asked.future)

  def _fail(self, futures: Sequence[concurrent.futures.Future], error: Exception) -> None:
    """Set an error for what cannot be computed."""
    for future in futures:
      self._running.discard(future)
      if not future.done():
        future.set_exception(error)
