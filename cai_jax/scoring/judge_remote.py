"""A judge behind an OpenAI-compatible server, which compares two responses."""

import contextlib
import dataclasses
from collections.abc import Sequence

import numpy as np

from cai_jax.runtime.errors import UnreadableError, UserError
from cai_jax.sampling.remote.connection import Connection
from cai_jax.sampling.types import Usage
from cai_jax.scoring.judge import Comparison, Judge, Match
from cai_jax.scoring.judge_answers import JudgeAnswer, label_log_probabilities, sampled_log_odds
from cai_jax.scoring.judge_client import JudgeClient, ask_server
from cai_jax.scoring.judge_local import compare_labels
from cai_jax.scoring.judge_questions import build_questions
from cai_jax.scoring.judge_server import JudgeServer, make_request


def remote_judge(client: JudgeClient, *, reasoning_tokens: int = 0, seed: int = 0) -> Judge:
  """Return a judge that asks a server.

  With log-probabilities, its log-odds and label mass are those of `label_log_probabilities`. A
  sampled verdict has the log-odds ±`judge_answers.SAMPLED_LOG_ODDS` and no label mass. A question
  that the server's filter of contents refuses has no preference and no mass.

  Args:
    client: asks the server. Each call of the judge closes it at its end.
    reasoning_tokens: most tokens that the judge writes before a sampled verdict.
    seed: seed of sampled verdicts.

  Returns:
    The judge. It raises UserError if a match cannot be put as a question or the server refuses one,
    and UnreachableError if all attempts fail.
  """

  def judge(matches: Sequence[Match]) -> list[Comparison]:
    with contextlib.closing(client):
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
