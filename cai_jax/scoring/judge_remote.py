"""A judge behind an OpenAI-compatible server.

Every answer goes to a journal as soon as it arrives, so a run that is killed asks nothing twice.
A `JudgeClient` keeps the journal and the connection open between questions.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence

import numpy as np

from cai_jax.runtime.errors import UnreadableError, UserError
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.remote.answers import read_usage
from cai_jax.sampling.remote.connection import Connection
from cai_jax.sampling.remote.fields import parse_body
from cai_jax.sampling.remote.refusals import RefusedError
from cai_jax.sampling.types import Completion, Usage
from cai_jax.scoring.judge import Comparison, Judge, Match
from cai_jax.scoring.judge_answers import (
  JudgeAnswer,
  label_log_probabilities,
  read_answer,
  sampled_log_odds,
)
from cai_jax.scoring.judge_local import compare_labels
from cai_jax.scoring.judge_questions import build_questions
from cai_jax.scoring.judge_server import PATHS, TOP_TOKENS, JudgeServer, make_request

ANSWER_BYTES = 1 << 20
TOKEN_BYTES = 4096
# The key of an answer has this name. Change it with the form of what is stored.
ANSWER_FORM = 'judge-1'


class JudgeClient:
  """Asks a server, and keeps its answers in a journal. Both are opened when they are needed.

  Args:
    server: the model's address and settings.
    journal: folder in which answers are stored, and looked up before the server is asked.
    process: index of this process, which selects the file that it writes.

  Attributes:
    server: as given.
  """

  def __init__(self, server: JudgeServer, journal: str | os.PathLike, process: int = 0):
    self.server = server
    self._folder, self._process = journal, process
    self._journal: Journal | None = None
    self._connection: Connection | None = None

  def answer(self, bodies: Sequence[dict]) -> list[JudgeAnswer]:
    """Return the answer to each request, from the journal or from the server.

    Equal requests are sent once. One that the server's filter of contents refuses is answered by
    ''.

    Args:
      bodies: the requests, such as those of `judge_server.text_request`.

    Raises:
      UserError: if the server refuses a request.
      UnreachableError: if all attempts fail.
    """
    if not bodies:
      return []
    keys = [_digest(self.server, body) for body in bodies]
    requests = dict(zip(keys, bodies, strict=True))
    answers = self._look_up(requests)
    missing = {key: body for key, body in requests.items() if key not in answers}
    answers |= self._ask(missing) if missing else {}
    return [answers[key] for key in keys]

  def close(self) -> None:
    """Close the journal and the connection."""
    if self._journal is not None:
      self._journal.close()
    if self._connection is not None:
      self._connection.close()

  def _look_up(self, keys: Mapping[str, dict]) -> dict[str, JudgeAnswer]:
    """Return the answers that the journal has."""
    if self._journal is None:
      self._journal = Journal(self._folder, self._process)
    else:
      self._journal.refresh()  # its index has nothing that was stored since
    prefix = self.server.key_prefix()  # keys of version 0.1.0 have none
    answers = {}
    for key in keys:
      stored = self._journal.get(key) or self._journal.get(key.removeprefix(prefix))
      if stored is not None:
        answers[key] = JudgeAnswer.from_json(stored.text)
    return answers

  def _ask(self, requests: Mapping[str, dict]) -> dict[str, JudgeAnswer]:
    """Return the server's answers, and store each as soon as it arrives."""
    assert self._journal is not None
    if self._connection is None:
      self._connection = Connection(self.server.connection_config())
    connection, answers = self._connection, {}
    futures = {
      connection.submit(functools.partial(ask_server, connection, self.server, body, key)): key
      for key, body in requests.items()
    }
    error = None
    for future in concurrent.futures.as_completed(futures):
      try:
        answers[futures[future]], usage = future.result()
      except concurrent.futures.CancelledError:
        continue
      except UserError as failure:
        # Requests in flight may still succeed, and what they cost is not lost.
        error = error or failure
        for other in futures:
          other.cancel()
        continue
      text = answers[futures[future]].to_json()
      self._journal.put([(futures[future], Completion([], text, [], 'stop', usage))])
    if error:
      raise error
    return answers


def remote_judge(
  server: JudgeServer,
  journal: str | os.PathLike,
  *,
  reasoning_tokens: int = 0,
  seed: int = 0,
) -> Judge:
  """Return a judge that asks a server.

  With log-probabilities, its log-odds and label mass are those of `label_log_probabilities`. A
  sampled verdict has the log-odds ±`judge_answers.SAMPLED_LOG_ODDS` and no label mass. A question
  that the server's filter of contents refuses has no preference and no mass.

  Args:
    server: the judge's address and settings.
    journal: folder in which answers are stored, and looked up before the server is asked.
    reasoning_tokens: most tokens that the judge writes before a sampled verdict.
    seed: seed of sampled verdicts.

  Returns:
    The judge. It raises UserError if a match cannot be put as a question or the server refuses one,
    and UnreachableError if all attempts fail.
  """

  def judge(matches: Sequence[Match]) -> list[Comparison]:
    with contextlib.closing(JudgeClient(server, journal)) as client:
      return judge_by(client, matches, reasoning_tokens, seed)

  return judge


def judge_by(
  client: JudgeClient, matches: Sequence[Match], reasoning_tokens: int = 0, seed: int = 0
) -> list[Comparison]:
  """Return the comparisons of a served judge, see `remote_judge`.

  Args:
    client: asks the judge.
    matches: what is compared.
    reasoning_tokens: most tokens that the judge writes before a sampled verdict.
    seed: seed of sampled verdicts.

  Raises:
    UserError: if a match cannot be put as a question or the server refuses one.
    UnreachableError: if all attempts fail.
  """
  bodies = []
  for number, match in enumerate(matches):
    try:
      questions = build_questions(match)
    except UserError as error:
      raise UnreadableError(f'match {number} (prompt {match.prompt!r}): {error}') from error
    bodies += [make_request(client.server, text, reasoning_tokens, seed) for text in questions]
  return _compare(client.server, matches, client.answer(bodies))


def answer_requests(
  server: JudgeServer, bodies: Sequence[dict], journal: str | os.PathLike
) -> list[JudgeAnswer]:
  """Return the answer to each request, as a `JudgeClient` of its own gives it.

  Args:
    server: the judge's address and settings.
    bodies: the requests, such as those of `judge_server.text_request`.
    journal: folder in which answers are stored, and looked up before the server is asked.

  Raises:
    UserError: if the server refuses a request.
    UnreachableError: if all attempts fail.
  """
  with contextlib.closing(JudgeClient(server, journal)) as client:
    return client.answer(bodies)


def check_judge(
  server: JudgeServer, matches: Sequence[Match] = (), reasoning_tokens: int = 0
) -> Usage:
  """Check that the server serves the judge and answers a question as the run needs it.

  Args:
    server: the judge's address and settings.
    matches: pairs of the run. The longest question is sent, so a context that is too short is
      noticed. Without any, a short one is sent.
    reasoning_tokens: most tokens that the judge writes before a sampled verdict.

  Returns:
    What the server counted for the question.

  Raises:
    UserError: if the server cannot be reached, does not serve the judge, refuses the question, or
      gives no log-probabilities although the verdict needs them.
  """
  if not matches:
    message = {'role': 'user', 'content': 'Name a color.'}
    matches = [Match('probe', [message], 'Choose the true answer.', ('x', 'y'), ('Red.', 'Two.'))]
  question = max((q for match in matches for q in build_questions(match)), key=len)
  with contextlib.closing(Connection(server.connection_config())) as connection:
    connection.check()
    request = make_request(server, question, reasoning_tokens, 0)
    return ask_server(connection, server, request, 'probe')[1]


def _digest(server: JudgeServer, body: dict) -> str:
  """Return the journal's key: the model's prefix, and a hex digest of all that it is sent."""
  text = json.dumps([ANSWER_FORM, server.identity(), body], sort_keys=True)
  return server.key_prefix() + hashlib.sha256(text.encode()).hexdigest()[:32]


def ask_server(
  connection: Connection, server: JudgeServer, body: dict, key: str
) -> tuple[JudgeAnswer, Usage]:
  """Ask a server, wait for its answer, and return it with what the server counted.

  Args:
    connection: the connection to it.
    server: its settings.
    body: the request.
    key: the request's key in the journal, or 'probe' for a test.

  Raises:
    UserError: if the server refuses the request.
    UnreachableError: if all attempts fail.
  """

  def read(data: bytes, attempts: int) -> tuple[JudgeAnswer, Usage]:
    answer = read_answer(data, needs_logprobs=server.verdict == 'logprobs')
    return answer, read_usage(parse_body(data), attempts)

  max_bytes = ANSWER_BYTES + TOKEN_BYTES * body['max_tokens'] * TOP_TOKENS[server.api]
  name = 'a test question' if key == 'probe' else 'a question of the judge'
  try:
    return connection.post(PATHS[server.api], body, read, name, key.encode(), max_bytes)
  except RefusedError as error:
    if not error.is_filter:
      raise
    return JudgeAnswer(''), Usage()


def _compare(
  server: JudgeServer, matches: Sequence[Match], answers: Sequence[JudgeAnswer]
) -> list[Comparison]:
  """Return the comparisons that follow from two answers per match."""
  if server.verdict == 'sampled':
    odds = np.reshape([sampled_log_odds(answer.text) for answer in answers], (-1, 2))
    return [
      Comparison(match.prompt, match.players, (float(first), -float(second)))
      for match, (first, second) in zip(matches, odds, strict=True)
    ]
  labels = [label_log_probabilities(answer) for answer in answers]
  log_p = np.reshape([values for values, _ in labels], (-1, 2, 2))
  mass = np.reshape([mass for _, mass in labels], (-1, 2))
  return [
    dataclasses.replace(c, label_mass=(min(1.0, float(first)), min(1.0, float(second))))
    for c, (first, second) in zip(compare_labels(matches, log_p), mass, strict=True)
  ]
