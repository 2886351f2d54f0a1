"""A judge behind an OpenAI-compatible server.

Every answer goes to a journal as soon as it arrives, so a run that is killed asks nothing twice.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Sequence

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
    requests = {}  # key → body; equal questions are asked once
    keys = []
    for number, match in enumerate(matches):
      try:
        questions = build_questions(match)
      except UserError as error:
        raise UnreadableError(f'match {number} (prompt {match.prompt!r}): {error}') from error
      for question in questions:
        body = make_request(server, question, reasoning_tokens, seed)
        keys.append(_digest(server, body))
        requests[keys[-1]] = body
    answers = _answer_all(server, requests, journal)
    return _compare(server, matches, [answers[key] for key in keys])

  return judge


def answer_requests(
  server: JudgeServer, bodies: Sequence[dict], journal: str | os.PathLike
) -> list[JudgeAnswer]:
  """Return the answer to each request, from the journal or from the server.

  Equal requests are sent once. One that the server's filter of contents refuses is answered by ''.

  Args:
    server: the judge's address and settings.
    bodies: the requests, such as those of `judge_server.text_request`.
    journal: folder in which answers are stored, and looked up before the server is asked.

  Raises:
    UserError: if the server refuses a request.
    UnreachableError: if all attempts fail.
  """
  keys = [_digest(server, body) for body in bodies]
  answers = _answer_all(server, dict(zip(keys, bodies, strict=True)), journal)
  return [answers[key] for key in keys]


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


def _answer_all(
  server: JudgeServer, requests: dict[str, dict], folder: str | os.PathLike
) -> dict[str, JudgeAnswer]:
  """Return the answer to each request: from the journal, or from the server."""
  if not requests:
    return {}
  with contextlib.ExitStack() as stack:
    journal = stack.enter_context(contextlib.closing(Journal(folder)))
    # Keys of version 0.1.0 have no prefix.
    prefix = server.key_prefix()
    stored = {key: journal.get(key) or journal.get(key.removeprefix(prefix)) for key in requests}
    answers = {
      key: JudgeAnswer.from_json(completion.text)
      for key, completion in stored.items()
      if completion is not None
    }
    missing = [key for key in requests if key not in answers]
    if not missing:
      return answers
    connection = stack.enter_context(contextlib.closing(Connection(server.connection_config())))
    futures = {
      connection.submit(functools.partial(ask_server, connection, server, requests[key], key)): key
      for key in missing
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
      journal.put([(futures[future], Completion([], text, [], 'stop', usage))])
    if error:
      raise error
  return answers


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
