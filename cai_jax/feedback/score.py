"""Requests of a chain to rate candidates, and the answers to them.

A chain yields a `Score` and receives one number per candidate. `answer_scores` stands between the
chain and the engine, which sees turns only. Every answer is stored in the turn journal under a hash
of everything that determines it, so nothing is asked twice. The candidates of one request are rated
together and without those of other chains, so that the numbers do not depend on what else runs.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

from cai_jax.dialogue import Message
from cai_jax.feedback.forward import forward
from cai_jax.feedback.stage import ChainEnded
from cai_jax.runtime.errors import UnreadableError, UserError, show
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

  def answer(item: Turn | Score) -> VariantChain:
    return rate(item) if isinstance(item, Score) else (yield item)

  return forward(chain, answer)


def count_tokens(chain: VariantChain) -> VariantChain:
  """Return the result of a chain, and the number of tokens that it sampled.

  Args:
    chain: yields turns and scores.
  """
  count = 0

  def answer(item: Turn | Score) -> VariantChain:
    nonlocal count
    received = yield item
    count += len(received.tokens) if isinstance(received, Completion) else 0
    return received

  result = yield from forward(chain, answer)
  return result, count


def rate_all_equally(score: Score) -> list[float]:
  """Return zeros: an answer for chains that are measured or shown and not sampled."""
  return [0.0] * len(score.texts)


def assume_first_labels(chain: Chain) -> Chain:
  """Return a chain for placeholder replies, in which each `LabelTurn` gets its first label.

  Args:
    chain: yields turns.
  """

  def answer(turn: Turn) -> Chain:
    completion = yield turn
    if isinstance(turn, LabelTurn):
      return Completion([turn.labels[0]], '', [0.0], 'length')
    return completion

  return forward(chain, answer)


def journaled_rates(source: RaterSource | None, journal: Journal) -> Callable[[Score], list[float]]:
  """Return a function that rates candidates, and stores and looks up its answers in a journal.

  It raises ChainEnded if the rater cannot read a candidate, such as one that is too long. Every
  other error of the rater ends the run, because it would end all chains. So does UserError for an
  answer that is not one finite number per candidate.

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
    except UnreadableError as error:
      raise ChainEnded(score.name, str(error)) from error
    numbers = _checked(numbers, score)
    journal.put([(key, Completion([], json.dumps(numbers), [], 'stop'))])
    return numbers

  return rate


def _key(identity: Any, score: Score) -> str:
  """Return the journal's key of a score: a hex digest of all that determines its answer."""
  messages = [[message['role'], message['content']] for message in score.messages]
  parts = [ANSWER_FORM, identity, messages, list(score.texts), score.question]
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _checked(numbers: Sequence[float], score: Score) -> list[float]:
  """Return the answer of a rater as floats, if it is one finite number per candidate."""
  checked = [float(number) for number in numbers]
  if len(checked) != len(score.texts) or not all(map(math.isfinite, checked)):
    raise UserError(
      f'{score.name}: a rater must give one finite number for each of {len(score.texts)} '
      f'candidates, but gave {show(checked)}. Change the rater, or choose another scorer in '
      'feedback.options.'
    )
  return checked


def _read(stored: Completion, count: int) -> list[float] | None:
  """Return the numbers of a stored answer, or None if it cannot be one."""
  try:
    numbers = [float(number) for number in json.loads(stored.text)]
  except (ValueError, TypeError):
    return None
  return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None
