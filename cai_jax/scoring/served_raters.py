"""Raters of candidates behind a server: the judge or guard model that an evaluation also asks.

A variant names such a rater by its kind and, in place of a checkpoint, by `SERVED`. To add a kind:

  SERVED_RATERS.register('my_kind')(ServedRater('judge', check_label, load, check))

Answers are stored in the journal of the judge or guard, so an evaluation by the same model asks for
none of them again, and its costs include them.
"""

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from cai_jax.dialogue import Message
from cai_jax.runtime.errors import UnreadableError
from cai_jax.runtime.registry import Registry
from cai_jax.sampling.types import Usage
from cai_jax.scoring.guards.guard import GUARDS
from cai_jax.scoring.guards.served import check_served, rate_by
from cai_jax.scoring.judge import Match
from cai_jax.scoring.judge_client import JudgeClient
from cai_jax.scoring.judge_remote import check_judge, judge_by
from cai_jax.scoring.judge_server import SERVED, JudgeServer
from cai_jax.scoring.raters import Rater, check_names, rate_by_pairs


@dataclasses.dataclass(frozen=True)
class Service:
  """A served judge or guard model, as a run asks it.

  Attributes:
    server: its address and settings.
    reasoning_tokens: most tokens that a judge writes before a sampled verdict.
    seed: seed of sampled verdicts.
  """

  server: JudgeServer
  reasoning_tokens: int = 0
  seed: int = 0

  def identity(self) -> dict[str, Any]:
    """Return what determines the ratings, as JSON types. The address does not."""
    seed = self.seed if self.server.temperature else 0
    return self.server.identity() | {'reasoning_tokens': self.reasoning_tokens, 'seed': seed}


class ServedRater(NamedTuple):
  """A kind of served rater.

  Attributes:
    role: 'judge' or 'guard': whose server it is in a run's evaluation.
    check_label: raises UserError for a label that the rater cannot have.
    load: maps a service, a label, and the client that asks its server to a rater.
    check: maps a service, a label, and the messages of a prompt, a candidate and the question for a
      judge to what the server counted for test requests. It raises UserError if the server cannot
      rate the candidate.
  """

  role: str
  check_label: Callable[[str], Any]
  load: Callable[[Service, str, JudgeClient], Rater]
  check: Callable[[Service, str, Sequence[Message], str, str], list[Usage]]


SERVED_RATERS: Registry[ServedRater] = Registry('served rater of candidates')


def load_guard(service: Service, label: str, client: JudgeClient) -> Rater:
  """Return a rater by a served guard, whose number is -P(unsafe).

  Without log-probabilities, P(unsafe) is 0 or 1.

  Args:
    service: the guard.
    label: the kind of the guard, a name in `GUARDS`.
    client: asks its server.
  """
  del service  # the client has its server
  guard = GUARDS[label]

  def rate(messages: Sequence[Message], texts: Sequence[str], question: str) -> list[float]:
    del question
    ratings = rate_by(guard, client, [messages] * len(texts), texts)
    unsafe = [rating.unsafe for rating in ratings if rating is not None]
    if len(unsafe) < len(texts):
      raise UnreadableError(
        f'Candidate {ratings.index(None) + 1} is blank, or the answer to it has not the form of '
        f'{guard.title}.'
      )
    return [-probability for probability in unsafe]

  weakref.finalize(rate, client.close)
  return rate


def check_guard(
  service: Service, label: str, messages: Sequence[Message], candidate: str, question: str
) -> list[Usage]:
  """Check that a served guard rates a candidate, see `ServedRater`."""
  del question
  return check_served(GUARDS[label], service.server, messages, candidate)


def load_judge(service: Service, label: str, client: JudgeClient) -> Rater:
  """Return a rater by a served judge that compares each pair of candidates.

  The number of a candidate is its mean log-odds in nats against the others.

  Args:
    service: the judge.
    label: ''.
    client: asks its server.
  """
  del label
  rate = rate_by_pairs(
    lambda matches: judge_by(client, matches, service.reasoning_tokens, service.seed)
  )
  weakref.finalize(rate, client.close)
  return rate


def check_judge_rater(
  service: Service, label: str, messages: Sequence[Message], candidate: str, question: str
) -> list[Usage]:
  """Check that a served judge compares candidates, see `ServedRater`."""
  del label
  match = Match('probe', messages, question, ('x', 'y'), (candidate, candidate))
  return [check_judge(service.server, [match], service.reasoning_tokens)]


SERVED_RATERS.register('guard')(ServedRater('guard', GUARDS.__getitem__, load_guard, check_guard))
SERVED_RATERS.register('judge')(
  ServedRater(
    'judge', lambda label: check_names('judge', SERVED, label), load_judge, check_judge_rater
  )
)
