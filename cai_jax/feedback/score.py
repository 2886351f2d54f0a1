"""Requests of a chain to rate candidates, and the answers to them.

A chain yields a `Score` and receives one number per candidate. `answer_scores` stands between the
chain and the engine, which sees turns only. Every answer is stored in the turn journal under a hash
of everything that determines it, so nothing is asked twice. The candidates of one request are rated
together and without those of other chains, so that the numbers do not depend on what else runs.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Generator, Sequence
from typing import Any

from cai_jax.dialogue import Message
from cai_jax.feedback.stage import ChainEnded
from cai_jax.runtime.errors import UserError
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.types import Chain, Completion, LabelTurn, Turn
from cai_jax.scoring.raters import Rater

# The journal's key of an answer has this name. Change it with the form of what is stored.
ANSWER_FORM = 'score-1'


@dataclasses.dataclass(frozen=True)
class Score:
  """A request to rate candidates.

  Attributes:
    name: name of the request in its chain, such as 'scores_1'.
    messages: the messages of the prompt, which the candidates answer.
    texts: the candidates.
    question: what a judge is asked, such as 'Choose the response that is less harmful.'
  """

  name: str
  messages: Sequence[Message]
  texts: Sequence[str]
  question: str


# A chain that may ask for ratings: it receives a completion for a turn, and numbers for a score.
VariantChain = Generator[Turn | Score, Any, Any]


@dataclasses.dataclass(frozen=True)
class RaterSource:
  """A rater that is loaded when the first answer is not in the journal.

  Attributes:
    identity: everything that determines its ratings, as JSON types.
    load: loads the rater; it is called once.
  """

  identity: Any
  load: Callable[[], Rater]


def answer_scores(chain: VariantChain, rate: Callable[[Score], list[float]]) -> Chain:
  """Return a chain without scores, which yields the turns of `chain` and returns its result.

  Args:
    chain: yields turns and scores.
    rate: returns one number per candidate of a score.
  """
  answer: Any = None
  error: UserError | None = None
  while True:
    try:
      item = chain.send(answer) if error is None else chain.throw(error)
    except StopIteration as done:
      return done.value
    answer = error = None
    if isinstance(item, Score):
      answer = rate(item)
      continue
    try:
      answer = yield item
    except UserError as refusal:  # the engine refuses the turn
      error = refusal


def count_tokens(chain: VariantChain) -> VariantChain:
  """Return the result of a chain, and the number of tokens that it sampled.

  Args:
    chain: yields turns and scores.
  """
  count, answer = 0, None
  error: UserError | None = None
  while True:
    try:
      item = chain.send(answer) if error is None else chain.throw(error)
    except StopIteration as done:
      return done.value, count
    answer = error = None
    try:
      answer = yield item
    except UserError as refusal:  # the engine refuses the turn
      error = refusal
    else:
      count += len(answer.tokens) if isinstance(answer, Completion) else 0


def rate_all_equally(score: Score) -> list[float]:
  """Return zeros: an answer for chains that are measured or shown and not sampled."""
  return [0.0] * len(score.texts)


def assume_first_labels(chain: Chain) -> Chain:
  """Return a chain for placeholder replies, in which each `LabelTurn` gets its first label.

  Args:
    chain: yields turns.
  """
  completion = None
  while True:
    try:
      turn = chain.send(completion)  # type: ignore[arg-type]  # None starts it
    except StopIteration as done:
      return done.value
    completion = yield turn
    if isinstance(turn, LabelTurn):
      completion = Completion([turn.labels[0]], '', [0.0], 'length')


def journaled_rates(source: RaterSource | None, journal: Journal) -> Callable[[Score], list[float]]:
  """Return a function that rates candidates, and stores and looks up its answers in a journal.

  It raises ChainEnded if the rater cannot read a candidate, such as one that is too long.

  Args:
    source: the rater; None for chains that ask for none.
    journal: the journal.
  """
  loaded: list[Rater] = []

  def rate(score: Score) -> list[float]:
    assert source is not None, 'the job was prepared with the rater of its variant'
    key = _key(source.identity, score)
    stored = journal.get(key)
    numbers = _read(stored, len(score.texts)) if stored is not None else None
    if numbers is not None:
      return numbers
    if not loaded:
      loaded.append(source.load())
    try:
      numbers = loaded[0](score.messages, score.texts, score.question)
    except UserError as error:
      raise ChainEnded(score.name, str(error)) from error
    journal.put([(key, Completion([], json.dumps(numbers), [], 'stop'))])
    return numbers

  return rate


def _key(identity: Any, score: Score) -> str:
  """Return the journal's key of a score: a hex digest of all that determines its answer."""
  messages = [[message['role'], message['content']] for message in score.messages]
  parts = [ANSWER_FORM, identity, messages, list(score.texts), score.question]
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _read(stored: Completion, count: int) -> list[float] | None:
  """Return the numbers of a stored answer, or None if it cannot be one."""
  try:
    numbers = [float(number) for number in json.loads(stored.text)]
  except (ValueError, TypeError):
    return None
  return numbers if len(numbers) == count else None
