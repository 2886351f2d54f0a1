"""The APIs of completions and of chats: request bodies, and the differences between servers.

To support another server, register a `Server` in `SERVERS`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cai_jax.runtime.registry import Registry
from cai_jax.sampling.types import SamplingConfig

_OPENAI = ('presence_penalty', 'frequency_penalty', 'logit_bias')
_ALL = ('min_p', 'repetition_penalty', *_OPENAI)


@dataclasses.dataclass(frozen=True)
class Server:
  """The features of a server's completions API, and its differences from OpenAI's.

  Attributes:
    accepts_tokens: whether a prompt may be a list of token ids.
    top_k: whether requests may set `top_k`.
    stop_token_ids: whether requests may set `stop_token_ids`.
    top_p_of_one: whether requests may set `top_p` to 1.
    logprobs: whether requests may ask for log-probabilities.
    returns_ids: whether answers have the token ids of the reply.
    scaled_logprobs: whether the server computes log-probabilities after biases, penalties and
      temperature.
    max_stop_texts: maximum number of stop texts in a request.
    settings: the fields of `SamplingConfig` besides temperature, filters and lengths that requests
      may set, with our meaning.
    names: the server's names of those that it calls otherwise.
    extra: further fields of every request. They turn off the server's own sampling defaults.
    asks_for_ids: further fields of a request for a completion, which ask for token ids.
  """

  accepts_tokens: bool = True
  top_k: bool = False
  stop_token_ids: bool = False
  top_p_of_one: bool = True
  logprobs: bool = True
  returns_ids: bool = False
  scaled_logprobs: bool = False
  max_stop_texts: int = 4
  settings: tuple[str, ...] = _OPENAI
  names: Mapping[str, str] = dataclasses.field(default_factory=dict)
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  asks_for_ids: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# vLLM and SGLang read sampling defaults from the model's generation_config.json, and llama.cpp has
# its own. Requests therefore state every setting, even those that have no effect. We apply
# temperature before the filters.
SERVERS: Registry[Server] = Registry('server')
SERVERS.register('openai')(Server())
SERVERS.register('vllm')(
  Server(
    top_k=True,
    stop_token_ids=True,
    returns_ids=True,
    max_stop_texts=64,
    settings=_ALL,
    extra={'top_k': -1, 'min_p': 0.0, 'repetition_penalty': 1.0},
    asks_for_ids={'return_token_ids': True},
  )
)
SERVERS.register('sglang')(
  Server(
    top_k=True,
    stop_token_ids=True,
    scaled_logprobs=True,
    max_stop_texts=64,
    settings=_ALL,
    extra={'top_k': -1, 'min_p': 0.0, 'repetition_penalty': 1.0},
  )
)
# TGI takes any other model name for the name of an adapter, and refuses top_p=1. It has no min_p,
# presence penalty or bias, and its frequency penalty counts the context too.
SERVERS.register('tgi')(
  Server(
    accepts_tokens=False,
    top_p_of_one=False,
    logprobs=False,
    settings=(),
    extra={'model': 'tgi'},
  )
)
# llama.cpp's presence and frequency penalties count the context too. By default, its repetition
# penalty reads the last 64 tokens; -1 stands for all.
SERVERS.register('llama.cpp')(
  Server(
    top_k=True,
    returns_ids=True,
    max_stop_texts=64,
    settings=('min_p', 'repetition_penalty', 'logit_bias'),
    names={'repetition_penalty': 'repeat_penalty'},
    extra={
      'top_k': 0,
      'min_p': 0.0,
      'repeat_penalty': 1.0,
      'repeat_last_n': -1,
      'samplers': ['penalties', 'temperature', 'top_k', 'top_p', 'min_p'],
    },
  )
)


def request_body(
  server: Server,
  model: str,
  prompt: list[int] | str,
  sampling: SamplingConfig,
  seed: int | None,
  stop_token_ids: Sequence[int],
  stop_texts: Sequence[str],
) -> dict[str, Any]:
  """Return the JSON body of a request for one completion.

  Args:
    server: the features of the server.
    model: the name that the model is served under.
    prompt: token ids, or text.
    sampling: temperature, filters and length.
    seed: the request's seed; None sends none, and the server draws its own.
    stop_token_ids: tokens that end the reply; sent only if the server supports them.
    stop_texts: texts that end the reply. The request has as many as the server accepts; the caller
      looks for the others in the answer.
  """
  body = {'model': model, 'prompt': prompt, 'max_tokens': sampling.max_tokens}
  body |= _settings(server, sampling, seed, stop_token_ids, stop_texts) | dict(server.asks_for_ids)
  if server.logprobs:
    body['logprobs'] = 1
  return body


def chat_body(
  server: Server,
  model: str,
  messages: Sequence[tuple[str, str]],
  sampling: SamplingConfig,
  seed: int | None,
  stop_token_ids: Sequence[int],
  stop_texts: Sequence[str],
  limit: str = 'max_tokens',
) -> dict[str, Any]:
  """Return the JSON body of a request for the reply in a chat.

  Args:
    server: as for `request_body`.
    model: as for `request_body`.
    messages: (role, content) pairs.
    sampling: as for `request_body`.
    seed: as for `request_body`.
    stop_token_ids: as for `request_body`.
    stop_texts: as for `request_body`.
    limit: the server's name of the largest number of tokens of a reply.
  """
  listed = [{'role': role, 'content': content} for role, content in messages]
  body = {'model': model, 'messages': listed, limit: sampling.max_tokens}
  return body | _settings(server, sampling, seed, stop_token_ids, stop_texts)


def _settings(
  server: Server,
  sampling: SamplingConfig,
  seed: int | None,
  stop_token_ids: Sequence[int],
  stop_texts: Sequence[str],
) -> dict[str, Any]:
  """Return the fields of a request that both APIs share; arguments as for `request_body`."""
  body = {'temperature': sampling.temperature, 'n': 1, 'stream': False, **server.extra}
  if seed is not None:
    body['seed'] = seed
  if server.top_p_of_one or sampling.top_p < 1:
    body['top_p'] = sampling.top_p
  if sampling.top_k:
    body['top_k'] = sampling.top_k
  body |= {
    server.names.get(name, name): value for name, value in changed_settings(sampling).items()
  }
  if sampling.logit_bias:
    body['logit_bias'] = {str(token): bias for token, bias in sampling.logit_bias}
  if server.stop_token_ids and stop_token_ids:
    body['stop_token_ids'] = list(stop_token_ids)
  if stop_texts:
    body['stop'] = list(stop_texts[: server.max_stop_texts])
  return body


def changed_settings(sampling: SamplingConfig) -> dict[str, Any]:
  """Return the settings that not every server supports and that are on, by name."""
  fields = {field.name: field.default for field in dataclasses.fields(sampling)}
  return {name: value for name in _ALL if (value := getattr(sampling, name)) != fields[name]}


def request_seed(key: np.ndarray) -> int:
  """Return the seed of a request, in [1, 2**31), from a turn's random key u32[2]."""
  return int(key[0]) % (2**31 - 1) + 1
