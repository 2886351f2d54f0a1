"""Read the bodies of requests to `/v1/completions` and `/v1/chat/completions`.

The fields are those of OpenAI's API, and those of vLLM's that `SamplingConfig` has. A field that
would change the answer and is not supported is refused, and so is an unknown one: nothing that a
client asks for is left out silently. A field that is null counts as absent.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from cai_jax.runtime.errors import UserError
from cai_jax.sampling.types import SamplingConfig
from cai_jax.scoring.positions import MOST_ALTERNATIVES
from cai_jax.serving.errors import RequestError

MOST_CHOICES = 128  # of a prompt, as OpenAI's API allows
MOST_PROMPTS = 2048  # of a request, times the choices of each
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of `max_tokens` for completions
# Fields that have the meaning of the setting with the same name.
_SETTINGS = (
  'temperature',
  'top_k',
  'top_p',
  'min_p',
  'repetition_penalty',
  'presence_penalty',
  'frequency_penalty',
  'stop_token_ids',
)
# The values of other fields that ask for nothing.
_NEUTRAL: Mapping[str, Sequence[Any]] = {
  'stream': (False,),
  'best_of': (1,),
  'suffix': ('',),
  'tools': ([],),
  'tool_choice': ('none', 'auto'),
  'response_format': ({'type': 'text'},),
  'modalities': (['text'],),
}
# Fields that concern a service, and change no answer of this server.
_IGNORED = (
  'metadata',
  'parallel_tool_calls',
  'prompt_cache_key',
  'safety_identifier',
  'service_tier',
  'store',
  'stream_options',
  'user',
)
_BOTH = ('model', 'n', 'seed', 'stop', 'logit_bias', 'max_tokens', 'logprobs', 'return_token_ids')
_COMPLETION = (*_BOTH, 'prompt', 'echo')
_CHAT = (*_BOTH, 'messages', 'max_completion_tokens', 'top_logprobs')

Ids = list[int]


@dataclasses.dataclass(frozen=True)
class Settings:
  """What both kinds of requests ask for.

  Attributes:
    model: name of the model.
    choices: number of replies to each prompt.
    max_tokens: maximum number of tokens of a reply; None stands for what the context leaves.
    sampling: the other settings of sampling.
    seed: seed of the replies; None draws other ones at each request.
    alternatives: number of most likely tokens to list at each position; None asks for no
      log-probabilities at all.
    return_ids: whether the answer has token ids.
  """

  model: str
  choices: int
  max_tokens: int | None
  sampling: SamplingConfig
  seed: int | None
  alternatives: int | None
  return_ids: bool


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
  """A request to continue texts.

  Attributes:
    settings: see `Settings`.
    prompts: a text or token ids each.
    echo: whether the answer begins with the prompt.
  """

  settings: Settings
  prompts: Sequence[str | Ids]
  echo: bool


@dataclasses.dataclass(frozen=True)
class ChatRequest:
  """A request to answer a dialogue.

  Attributes:
    settings: see `Settings`.
    messages: the dialogue; roles are 'system', 'user' and 'assistant', contents are texts.
  """

  settings: Settings
  messages: Sequence[dict[str, str]]


def read_completion(body: Mapping[str, Any]) -> CompletionRequest:
  """Read the body of a request to `/v1/completions`.

  Args:
    body: the JSON object.

  Raises:
    RequestError: if a field is missing, unknown, not supported or has a wrong value.
  """
  body = _checked(body, _COMPLETION)
  echo = _flag(body, 'echo')
  most = MOST_ALTERNATIVES
  alternatives = _integer(body, 'logprobs', 0, most) if 'logprobs' in body else None
  least = 0 if echo else 1  # without a reply, there must be a prompt to return
  max_tokens = _integer(body, 'max_tokens', least, None, DEFAULT_COMPLETION_TOKENS)
  settings, prompts = _settings(body, max_tokens, alternatives), _prompts(body.get('prompt'))
  if settings.choices * len(prompts) > MOST_PROMPTS:
    raise RequestError(
      f'{len(prompts)} prompts with n={settings.choices} ask for too many replies. Ask for at most '
      f'{MOST_PROMPTS} in a request.',
      'n',
    )
  return CompletionRequest(settings, prompts, echo)


def read_chat(body: Mapping[str, Any]) -> ChatRequest:
  """Read the body of a request to `/v1/chat/completions`.

  Args:
    body: the JSON object.

  Raises:
    RequestError: if a field is missing, unknown, not supported or has a wrong value.
  """
  body = _checked(body, _CHAT)
  names = [name for name in ('max_completion_tokens', 'max_tokens') if name in body]
  if len(names) == 2 and body[names[0]] != body[names[1]]:
    raise RequestError(
      'max_tokens and max_completion_tokens differ. Give one of them; they mean the same here.',
      'max_tokens',
    )
  max_tokens = _integer(body, names[0], 1, None) if names else None
  alternatives = None
  if _flag(body, 'logprobs'):
    alternatives = _integer(body, 'top_logprobs', 0, MOST_ALTERNATIVES, 0)
  elif 'top_logprobs' in body:
    raise RequestError('top_logprobs needs "logprobs": true.', 'top_logprobs')
  return ChatRequest(_settings(body, max_tokens, alternatives), _messages(body.get('messages')))


def _checked(body: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
  """Return the fields that are not null; refuse unknown ones and what is not supported."""
  given = {name: value for name, value in body.items() if value is not None}
  for name, value in given.items():
    if name in _NEUTRAL:
      if value not in _NEUTRAL[name]:
        allowed = ' or '.join(_show(value) for value in _NEUTRAL[name])
        raise RequestError(
          f'{name}={_show(value)} is not supported here. Leave it out, or send {allowed}.',
          name,
        )
    elif name not in (*known, *_SETTINGS, *_IGNORED):
      supported = sorted({*known, *_SETTINGS})
      raise RequestError(
        f'The field {_show(name)} is not known here. The fields are {", ".join(supported)}.', name
      )
  if not isinstance(given.get('model'), str):
    raise RequestError('model is missing. It is the name that GET /v1/models lists.', 'model')
  return given


def _settings(body: Mapping[str, Any], max_tokens: int | None, alternatives: int | None):
  """Return the `Settings` of a request."""
  values = {name: body[name] for name in _SETTINGS if name in body}
  if values.get('top_k') == -1:  # vLLM's spelling of "all"
    values['top_k'] = 0
  try:
    sampling = SamplingConfig(stop=_stops(body), logit_bias=_biases(body), **values)
  except UserError as error:
    raise RequestError(str(error)) from None
  return Settings(
    model=body['model'],
    choices=_integer(body, 'n', 1, MOST_CHOICES, 1),
    max_tokens=max_tokens,
    sampling=sampling,
    seed=_integer(body, 'seed', -(2**63), 2**63 - 1) if 'seed' in body else None,
    alternatives=alternatives,
    return_ids=_flag(body, 'return_token_ids'),
  )


def _prompts(prompt: Any) -> Sequence[str | Ids]:
  """Return the prompts of a request: texts, or lists of token ids."""
  prompts = [prompt] if isinstance(prompt, str) or _is_ids(prompt) else prompt
  valid = isinstance(prompts, list) and all(isinstance(p, str) or _is_ids(p) for p in prompts)
  if not valid or not 1 <= len(prompts) <= MOST_PROMPTS:
    raise RequestError(
      f'prompt is {_show(prompt, 60)}. It must be a text, a list of token ids, or a list of 1 to '
      f'{MOST_PROMPTS} of these.',
      'prompt',
    )
  return prompts


def _is_ids(value: Any) -> bool:
  """Return whether a value of JSON is a list of token ids, which has at least one."""
  return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _messages(messages: Any) -> Sequence[dict[str, str]]:
  """Return the messages of a chat, with contents of several text parts joined."""
  if not isinstance(messages, list) or not messages:
    raise RequestError('messages must be a list with at least one message.', 'messages')
  return [_message(message, f'messages[{i}]') for i, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, str]:
  if not isinstance(message, dict) or not isinstance(message.get('role'), str):
    raise RequestError(f'{where} must be an object with role and content.', 'messages')
  role = {'developer': 'system'}.get(message['role'], message['role'])
  if role not in ('system', 'user', 'assistant'):
    raise RequestError(
      f"{where} has the role {_show(role)}. Use 'system', 'user' or 'assistant'.", 'messages'
    )
  content = message.get('content')
  parts = content if isinstance(content, list) else [{'type': 'text', 'text': content}]
  given = [p.get('text') for p in parts if isinstance(p, dict) and p.get('type') == 'text']
  texts = [text for text in given if isinstance(text, str)]
  if len(texts) != len(parts):
    raise RequestError(
      f'{where} has the content {_show(content, 60)}. It must be a text, or a list of parts '
      '{"type": "text", "text": ...}. Images, audio and tool calls are not supported.',
      'messages',
    )
  if asked := [name for name in ('tool_calls', 'function_call') if message.get(name)]:
    raise RequestError(f'{where} has {asked[0]}. This server has no tools.', 'messages')
  return {'role': role, 'content': ''.join(texts)}


def _stops(body: Mapping[str, Any]) -> tuple[str, ...]:
  stop = body.get('stop', [])
  texts = [stop] if isinstance(stop, str) else stop
  if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
    raise RequestError(f'stop={_show(stop)} must be a text or a list of texts, none empty.', 'stop')
  return tuple(dict.fromkeys(texts))


def _biases(body: Mapping[str, Any]) -> tuple[tuple[int, float], ...]:
  biases = body.get('logit_bias', {})
  try:
    return tuple((int(token), float(bias)) for token, bias in biases.items())
  except (AttributeError, TypeError, ValueError):
    raise RequestError(
      f'logit_bias={_show(biases)} must be an object from token ids to numbers.', 'logit_bias'
    ) from None


def _flag(body: Mapping[str, Any], name: str) -> bool:
  value = body.get(name, False)
  if not isinstance(value, bool):
    raise RequestError(f'{name}={_show(value)} must be true or false.', name)
  return value


def _integer(
  body: Mapping[str, Any], name: str, least: int, most: int | None, default: int | None = None
) -> int:
  """Return a field that is an integer within bounds."""
  value = body.get(name, default)
  if type(value) is not int or value < least or (most is not None and value > most):
    bounds = f'of at least {least}' if most is None else f'from {least} to {most}'
    raise RequestError(f'{name}={_show(value)} must be an integer {bounds}.', name)
  return value


def _show(value: Any, length: int = 100) -> str:
  """Return a value of JSON as an error message quotes it."""
  text = json.dumps(value, ensure_ascii=False)
  return text if len(text) <= length else f'{text[: length - 3]}...'
