"""Requests to a served judge or guard model, whose answers are kept.

Every answer goes to a journal as soon as it arrives, so a run that is killed asks nothing twice.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence

from cai_jax.runtime.errors import UserError
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.remote.answers import read_usage
from cai_jax.sampling.remote.connection import Connection
from cai_jax.sampling.remote.fields import parse_body
from cai_jax.sampling.remote.refusals import RefusedError
from cai_jax.sampling.types import Completion, Usage
from cai_jax.scoring.judge_answers import JudgeAnswer, read_answer
from cai_jax.scoring.judge_server import PATHS, TOP_TOKENS, JudgeServer

ANSWER_BYTES = 1 << 20
TOKEN_BYTES = 4096
BYTES_PER_TOKEN = 4  # of English text, about
# The key of an answer has this name. Change it with the form of what is stored.
ANSWER_FORM = 'judge-1'


class JudgeClient:
  """Asks a server, and keeps its answers in a journal. Both are opened when they are needed.

  A client that was closed opens them again for its next question.

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
    self._journal = self._connection = None

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


@dataclasses.dataclass
class Tally:
  """How much served models are asked.

  Attributes:
    requests: number of requests.
    read: tokens of their texts.
    sampled: most tokens of their answers.
  """

  requests: float = 0.0
  read: float = 0.0
  sampled: float = 0.0

  def add(self, other: 'Tally', share: float = 1.0) -> None:
    """Add what other models are asked.

    Args:
      other: what they are asked.
      share: how many times it is added.
    """
    self.requests += share * other.requests
    self.read += share * other.read
    self.sampled += share * other.sampled


class CountingClient(JudgeClient):
  """Counts requests instead of sending them, and answers each with an empty text.

  Equal requests count once, as a `JudgeClient` sends them once. Only the server knows how it
  tokenizes a text, so `BYTES_PER_TOKEN` bytes of text count as a token.

  Args:
    server: the model's address and settings.
    tally: what the requests are added to.
  """

  def __init__(self, server: JudgeServer, tally: Tally):
    super().__init__(server, '')
    self._tally, self._seen = tally, set[str]()

  def answer(self, bodies: Sequence[dict]) -> list[JudgeAnswer]:
    """Count requests. Arguments are those of `JudgeClient.answer`."""
    for body in bodies:
      key = _digest(self.server, body)
      if key not in self._seen:
        self._seen.add(key)
        texts = [m['content'] for m in body.get('messages', ())] or [body['prompt']]
        size = sum(len(text.encode()) for text in texts)
        self._tally.add(Tally(1, size / BYTES_PER_TOKEN, body['max_tokens']))
    return [JudgeAnswer('')] * len(bodies)


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
