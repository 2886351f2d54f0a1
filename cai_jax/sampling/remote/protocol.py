"""The completions API: request bodies, answers, and the differences between servers.

To support another server, register a `Server` in `SERVERS`.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cai_jax.runtime.registry import Registry
from cai_jax.sampling.types import SamplingConfig


@dataclasses.dataclass(frozen=True)
class Server:
  """The features of a server's completions API, and its differences from OpenAI's.

  Attributes:
    accepts_tokens: whether a prompt may be a list of token ids.
    top_k: whether requests may set `top_k`.
    stop_token_ids: whether requests may set `stop_token_ids`.
    top_p_of_one: whether requests may set `top_p` to 1.
    logprobs: whether requests may ask for log-probabilities.
    scaled_logprobs: whether the server computes log-probabilities after temperature.
    max_stop_texts: maximum number of stop texts in a request.
    extra: further fields of every request. They turn off the server's own sampling defaults and
      ask for token ids.
  """

  accepts_tokens: bool = True
  top_k: bool = False
  stop_token_ids: bool = False
  top_p_of_one: bool = True
  logprobs: bool = True
  scaled_logprobs: bool = False
  max_stop_texts: int = 4
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# vLLM and SGLang read sampling defaults from the model's generation_config.json, and llama.cpp has
# its own. Requests therefore state every setting, even those that have no effect. We apply
# temperature before the filters.
SERVERS: Registry[Server] = Registry('server')
SERVERS.register('openai')(Server())
SERVERS.register('vllm')(
  Server(
    top_k=True,
    stop_token_ids=True,
    max_stop_texts=64,
    extra={'top_k': -1, 'min_p': 0.0, 'repetition_penalty': 1.0, 'return_token_ids': True},
  )
)
SERVERS.register('sglang')(
  Server(
    top_k=True,
    stop_token_ids=True,
    scaled_logprobs=True,
    max_stop_texts=64,
    extra={'top_k': -1, 'min_p': 0.0, 'repetition_penalty': 1.0},
  )
)
# TGI takes any other model name for the name of an adapter, and refuses top_p=1.
SERVERS.register('tgi')(
  Server(accepts_tokens=False, top_p_of_one=False, logprobs=False, extra={'model': 'tgi'})
)
SERVERS.register('llama.cpp')(
  Server(
    top_k=True,
    max_stop_texts=64,
    extra={
      'top_k': 0,
      'min_p': 0.0,
      'repeat_penalty': 1.0,
      'samplers': ['temperature', 'top_k', 'top_p'],
    },
  )
)


def request_body(
  server: Server,
  model: str,
  prompt: list[int] | str,
  sampling: SamplingConfig,
  seed: int,
  stop_token_ids: Sequence[int],
  stop_texts: Sequence[str],
) -> dict[str, Any]:
  """Return the JSON body of a request for one completion.

  Args:
    server: the features of the server.
    model: the name that the model is served under.
    prompt: token ids, or text.
    sampling: temperature, filters and length.
    seed: the request's seed.
    stop_token_ids: tokens that end the reply; sent only if the server supports them.
    stop_texts: texts that end the reply. The request has as many as the server accepts; the caller
      looks for the others in the answer.
  """
  body = {
    'model': model,
    'prompt': prompt,
    'max_tokens': sampling.max_tokens,
    'temperature': sampling.temperature,
    'seed': seed,
    'n': 1,
    'stream': False,
    **server.extra,
  }
  if server.top_p_of_one or sampling.top_p < 1:
    body['top_p'] = sampling.top_p
  if sampling.top_k:
    body['top_k'] = sampling.top_k
  if server.logprobs:
    body['logprobs'] = 1
  if server.stop_token_ids and stop_token_ids:
    body['stop_token_ids'] = list(stop_token_ids)
  if stop_texts:
    body['stop'] = list(stop_texts[: server.max_stop_texts])
  return body


def request_seed(key: np.ndarray) -> int:
  """Return the seed of a request, in [1, 2**31), from a turn's random key u32[2]."""
  return int(key[0]) % (2**31 - 1) + 1


class Answer(NamedTuple):
  """The first choice of a server's answer.

  Attributes:
    text: the reply.
    end: what ended the reply: 'length', 'token', 'stop_text', or 'unknown' if it was one of the
      last two.
    tokens: sampled token ids, or None if the server does not return them.
    pieces: text of each token, if returned.
    logprobs: log-probability of each token in nats, if returned; NaN where one is missing.
  """

  text: str
  end: str
  tokens: list[int] | None
  pieces: list[str]
  logprobs: list[float]


class ProtocolError(Exception):
  """An answer that does not follow the completions API."""


def read_answer(data: bytes) -> Answer:
  """Parse the body of a response.

  Args:
    data: the body.

  Raises:
    ProtocolError: if it does not follow the API.
  """
  try:
    return _parse_answer(json.loads(data))
  except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
    raise ProtocolError(repr(error)) from error


def _parse_answer(content: Any) -> Answer:
  """Return the first choice; raise ProtocolError or what indexing malformed content raises."""
  choice = content['choices'][0]
  text, finish_reason = choice['text'], choice['finish_reason']
  if not isinstance(text, str):
    raise ProtocolError(f'text is {text!r}')
  tokens, pieces, logprobs = choice.get('token_ids'), [], []
  record = choice.get('logprobs') or {}
  if 'content' in record:  # llama.cpp uses the format of the chat API
    pieces = [entry['token'] for entry in record['content']]
    logprobs = [entry['logprob'] for entry in record['content']]
    ids = [entry.get('id') for entry in record['content']]
    # llama.cpp omits tokens that are part of a character; then the ids are incomplete.
    total = (content.get('usage') or {}).get('completion_tokens')
    if ids and None not in ids and len(ids) == total:
      tokens = ids
  else:
    pieces = list(record.get('tokens') or ())
    logprobs = list(record.get('token_logprobs') or ())
  if tokens is not None and not all(isinstance(token, int) for token in tokens):
    raise ProtocolError(f'token_ids are {tokens!r}')
  logprobs = [math.nan if x is None else float(x) for x in logprobs]
  if len(pieces) != len(logprobs):
    raise ProtocolError(f'{len(pieces)} tokens have {len(logprobs)} logprobs')
  return Answer(text, _end_of(choice, finish_reason), tokens, pieces, logprobs)


def _end_of(choice: Mapping[str, Any], finish_reason: str) -> str:
  """Return what ended the reply, as in `Answer.end`.

  vLLM states the stop token or stop text as `stop_reason` (None is the end-of-text token), SGLang
  as `matched_stop`.
  """
  ends = {'length': 'length', 'eos_token': 'token', 'stop_sequence': 'stop_text'}
  if finish_reason in ends:
    return ends[finish_reason]
  if finish_reason != 'stop':
    raise ProtocolError(f'finish_reason is {finish_reason!r}')
  for name in ('stop_reason', 'matched_stop'):
    if name in choice:
      return 'stop_text' if isinstance(choice[name], str) else 'token'
  return 'unknown'
