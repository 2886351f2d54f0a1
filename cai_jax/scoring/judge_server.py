"""Settings of a judge or guard model behind an OpenAI-compatible API, and the requests to it.

The API is that of chats (`/chat/completions`) or of completions (`/completions`). The verdict comes
from the log-probabilities of the most likely tokens (`logprobs` and `top_logprobs`, which vLLM,
SGLang, llama.cpp and OpenAI share), or from the text alone (`sampled`).
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

from cai_jax.dialogue import Message
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.settings import setting
from cai_jax.sampling.remote import RemoteConfig
from cai_jax.scoring.judge_questions import OPENING, REASON_FIRST

SERVED = 'served'  # in place of a checkpoint: a `JudgeServer` says where the model is
VERDICTS = ('logprobs', 'sampled')
PATHS = {'chat': '/chat/completions', 'completions': '/completions'}
# The most alternatives per token that OpenAI lists. Servers of one's own list as many.
TOP_TOKENS = {'chat': 20, 'completions': 5}
LABEL_TOKENS = 4  # a label such as ' (A)' has up to three tokens
VERDICT_TOKENS = 16  # of a verdict in text, without reasoning
ANSWER_ONLY = 'Answer with "(A)" or "(B)" and nothing else.'


@dataclasses.dataclass(frozen=True)
class JudgeServer:
  """A judge or guard model behind an OpenAI-compatible API, and settings of requests.

  Raises:
    UserError: if a value is not allowed.
  """

  url: str = setting(
    '',
    "Base URL of the API, such as 'http://localhost:8000/v1'. '' serves no model.",
    added=True,
  )
  model: str = setting('', 'The name that the model is served under.', added=True)
  revision: str = setting(
    '',
    'Revision of the served weights. Change it when the weights change, so that the journal treats '
    'them as another model.',
    added=True,
  )
  api: str = setting(
    'chat',
    "'chat' asks at /chat/completions, where the server applies the chat template. 'completions' "
    'asks at /completions with plain text, as base models read it.',
    added=True,
  )
  verdict: str = setting(
    'logprobs',
    "'logprobs' reads the log-probabilities of the labels. 'sampled' reads the label in the "
    'text, for servers without log-probabilities and for judges that reason first.',
    added=True,
  )
  temperature: float = setting(0.0, 'Temperature of a sampled verdict.', added=True)
  timeout_seconds: float = setting(
    300.0,
    'Seconds before a request times out, from connecting to the last byte of the answer.',
    added=True,
  )
  retries: int = setting(8, 'Maximum number of retries of a request.', added=True)
  backoff_seconds: float = setting(
    1.0,
    'Seconds before the first retry. The wait doubles with every further retry.',
    added=True,
  )
  max_concurrent: int = setting(16, 'Maximum number of concurrent requests.', added=True)
  api_key_env: str = setting(
    '',
    "Name of the environment variable that contains the API key. '' sends no key.",
    added=True,
  )
  give_up_seconds: float = setting(
    3600.0,
    'Seconds after which a request is not retried any more, however many retries are left.',
    added=True,
  )
  requests_per_minute: float = setting(
    0.0, 'Most requests per minute that are sent. 0 sets no limit.', added=True
  )
  price_input: float = setting(
    0.0, 'Price of a million tokens of questions, in any currency. 0 means no price.', added=True
  )
  price_cached_input: float = setting(
    -1.0,
    "Price of a million tokens of questions that come from the server's cache. -1 means that of "
    'price_input.',
    added=True,
  )
  price_output: float = setting(
    0.0, 'Price of a million sampled tokens. 0 means no price.', added=True
  )

  def __post_init__(self):
    self.connection_config()
    for name, valid, allowed in (
      ('api', self.api in PATHS, f'one of {", ".join(map(repr, PATHS))}'),
      ('verdict', self.verdict in VERDICTS, f'one of {", ".join(map(repr, VERDICTS))}'),
      ('temperature', 0 <= self.temperature < math.inf, 'at least 0 and finite'),
      (
        'temperature',
        self.verdict == 'sampled' or not self.temperature,
        "0 unless verdict='sampled', because log-probabilities need no temperature",
      ),
    ):
      if not valid:
        raise UserError(f'{name}={getattr(self, name)!r} must be {allowed}.')

  def connection_config(self) -> RemoteConfig:
    """Return the settings of the connection.

    Raises:
      UserError: if one of them is not allowed.
    """
    shared = 'url model revision timeout_seconds retries backoff_seconds'.split()
    shared += 'max_concurrent api_key_env give_up_seconds requests_per_minute'.split()
    shared += 'price_input price_cached_input price_output'.split()
    values = {name: getattr(self, name) for name in shared}
    # The server tokenizes, and the longest question is sent before the run starts.
    return RemoteConfig(**values, tokenizer='none', prompt='text', max_positions=1)

  def key_prefix(self) -> str:
    """Return how the journal's keys of this model's answers begin, to tell whose costs they are.

    It depends on the model alone: rubrics ask the same judge for another kind of verdict.
    """
    text = json.dumps([self.model, self.revision])
    return hashlib.sha256(text.encode()).hexdigest()[:8] + '-'

  def as_text(self) -> 'JudgeServer':
    """Return the settings for questions whose answer is read in the text."""
    return dataclasses.replace(self, verdict='sampled')

  def identity(self) -> dict[str, Any]:
    """Return what determines the verdicts, by name. The address does not."""
    names = ('model', 'revision', 'api', 'verdict', 'temperature')
    return {name: getattr(self, name) for name in names}


def make_request(
  server: JudgeServer, question: str, reasoning_tokens: int, seed: int
) -> dict[str, Any]:
  """Return the JSON body of the request for a verdict.

  Args:
    server: the judge.
    question: a question of `judge_questions.build_question`.
    reasoning_tokens: most tokens that the judge writes before a sampled verdict; 0 asks for the
      verdict at once.
    seed: seed of a sampled verdict; it is sent if the temperature is above 0.
  """
  sampled = server.verdict == 'sampled'
  tokens = reasoning_tokens + VERDICT_TOKENS if sampled else LABEL_TOKENS
  asked = f'{question}\n\n{REASON_FIRST if reasoning_tokens else ANSWER_ONLY}'
  if server.api == 'completions' and not reasoning_tokens:
    asked = f'{question}\n\n{OPENING}'
  elif server.api == 'completions':
    asked = f'{asked}\n\n'
  return _request(server, asked, tokens, seed) | _wanted_logprobs(server)


def text_request(server: JudgeServer, question: str, max_tokens: int, seed: int) -> dict[str, Any]:
  """Return the JSON body of a request whose answer is read as text.

  Args:
    server: the judge.
    question: what it is asked.
    max_tokens: most tokens of the answer.
    seed: seed of the answer; it is sent if the temperature is above 0.
  """
  return _request(server, question if server.api == 'chat' else f'{question}\n\n', max_tokens, seed)


def messages_request(
  server: JudgeServer, messages: Sequence[Message], max_tokens: int
) -> dict[str, Any]:
  """Return the JSON body of a request for a reply to a conversation, with `api='chat'`.

  Args:
    server: the model's address and settings.
    messages: the conversation.
    max_tokens: most tokens of the reply.
  """
  body = _request(server, '', max_tokens, 0)
  return body | {'messages': list(messages)} | _wanted_logprobs(server)


def _wanted_logprobs(server: JudgeServer) -> dict[str, Any]:
  """Return the part of a request that asks for log-probabilities, if the verdict needs them."""
  top = TOP_TOKENS[server.api]
  if server.verdict == 'sampled':
    return {}
  return {'logprobs': True, 'top_logprobs': top} if server.api == 'chat' else {'logprobs': top}


def _request(server: JudgeServer, asked: str, max_tokens: int, seed: int) -> dict[str, Any]:
  """Return the JSON body of a request for text."""
  body: dict[str, Any] = {
    'model': server.model,
    'max_tokens': max_tokens,
    'temperature': server.temperature,
    'n': 1,
    'stream': False,
  }
  if server.temperature:
    body['seed'] = seed % (2**31 - 1)
  if server.api == 'chat':
    return body | {'messages': [{'role': 'user', 'content': asked}]}
  return body | {'prompt': asked}
