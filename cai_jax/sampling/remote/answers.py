"""A server's answer, read and compared with its request.

- `read_answer` reads the body of a response. What does not follow the API is a `ProtocolError`: the
  answer may be cut short or come from a proxy, so the request is sent again.
- `check_answer` compares an answer with its request. An answer that follows the API and contradicts
  the request is a `ContradictionError`: the server would give it again.
"""

import dataclasses
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cai_jax.sampling.remote.fields import (
  ProtocolError,
  optional,
  parse_body,
  read_list,
  read_text,
  typed,
)
from cai_jax.sampling.text import decode
from cai_jax.sampling.types import Usage

# What ended a reply, by the finish reason of the API. 'stop' does not tell a token from a text.
ENDS = {
  'length': 'length',
  'eos_token': 'token',
  'stop_sequence': 'stop_text',
  'content_filter': 'content_filter',
}
MAX_LOGPROB = 1e-3  # log-probabilities are at most 0, except for rounding


class ContradictionError(Exception):
  """An answer that contradicts its request. The message is one or two sentences."""


@dataclasses.dataclass(frozen=True)
class Request:
  """What an answer is compared with.

  Attributes:
    prompt_tokens: the token ids of the prompt, as the server must read it.
    max_tokens: maximum number of tokens of the reply.
    stop_token_ids: all tokens that end the reply.
    stop_texts: the stop texts that the request contains.
    vocab_size: number of token ids of the tokenizer.
    tokenizer_name: name of the tokenizer, for error messages.
  """

  prompt_tokens: Sequence[int]
  max_tokens: int
  stop_token_ids: Sequence[int]
  stop_texts: Sequence[str]
  vocab_size: int
  tokenizer_name: str


class Answer(NamedTuple):
  """The choice in a server's answer.

  Attributes:
    text: the reply.
    end: what ended the reply: 'length', 'token', 'stop_text', 'content_filter', or 'unknown' if it
      was a token or a stop text.
    tokens: sampled token ids, or None if the server does not return them.
    pieces: text of each token, if returned.
    logprobs: log-probability of each token in nats, if returned; NaN where one is missing.
    prompt_tokens: number of tokens that the server read, if it says so.
    completion_tokens: number of tokens that the server sampled, if it says so.
    prompt_ids: token ids that the server read, if returned.
    cached_tokens: number of the read tokens that were in the server's cache, if it says so.
  """

  text: str
  end: str
  tokens: list[int] | None = None
  pieces: Sequence[str] = ()
  logprobs: Sequence[float] = ()
  prompt_tokens: int | None = None
  completion_tokens: int | None = None
  prompt_ids: list[int] | None = None
  cached_tokens: int | None = None

  def usage(self, attempts: int) -> Usage:
    """Return what the reply took, after a number of requests for it."""
    return Usage(self.prompt_tokens, self.cached_tokens, self.completion_tokens, attempts)


FILTERED = Answer('', 'content_filter')


# Reading.


def read_answer(data: bytes) -> Answer:
  """Parse the body of a response.

  Args:
    data: the body.

  Raises:
    ProtocolError: if it does not follow the API.
    ContradictionError: if it does, but has several choices or an unknown finish reason.
  """
  content = parse_body(data)
  (choice, end), usage = read_choice(content), read_usage(content)
  read, sampled, cached = usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens
  if end == 'content_filter':
    return FILTERED._replace(prompt_tokens=read, completion_tokens=sampled, cached_tokens=cached)
  text = read_text(choice.get('text'), 'text')
  tokens = _ids(choice, 'token_ids')
  pieces, logprobs, content_ids = _read_logprobs(optional(choice, 'logprobs', dict) or {})
  # llama.cpp omits tokens that are part of a character; then the ids are incomplete.
  if tokens is None and content_ids and len(content_ids) == sampled:
    tokens = content_ids
  prompt_ids = _ids(choice, 'prompt_token_ids')
  return Answer(text, end, tokens, pieces, logprobs, read, sampled, prompt_ids, cached)


def read_choice(content: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
  """Return the choice in a parsed body of either API, and what ended it, as in `Answer.end`.

  Raises:
    ProtocolError: if the body does not follow the API.
    ContradictionError: if it does, but has several choices or an unknown finish reason.
  """
  choices = typed(content.get('choices'), list, 'choices')
  if not choices:
    raise ProtocolError('choices is empty')
  if len(choices) > 1:
    raise ContradictionError(f'It has {len(choices)} choices, but the request asks for one.')
  choice = typed(choices[0], dict, 'choices[0]')
  if optional(choice, 'index', int) not in (None, 0):
    raise ContradictionError(f'Its choice has index {choice["index"]}, but only 0 was asked for.')
  return choice, _read_end(choice)


def read_usage(content: Mapping[str, Any], attempts: int = 1) -> Usage:
  """Return the usage in a parsed body of either API.

  Args:
    content: the body.
    attempts: number of requests that were sent for it.

  Raises:
    ProtocolError: if it does not follow the API.
    ContradictionError: if there are more tokens from the cache than in the prompt.
  """
  usage = optional(content, 'usage', dict) or {}
  details = optional(usage, 'prompt_tokens_details', dict) or {}
  read, cached = _count(usage, 'prompt_tokens'), _count(details, 'cached_tokens')
  if (cached or 0) > (read or 0):
    raise ContradictionError(f'Its usage counts {cached} cached tokens in a prompt of {read}.')
  return Usage(read, cached, _count(usage, 'completion_tokens'), attempts)


def _read_logprobs(record: Mapping[str, Any]) -> tuple[list[str], list[float], list[int] | None]:
  """Return texts and log-probabilities of the tokens, and their ids if there are some."""
  ids = None
  if 'content' in record:  # llama.cpp uses the format of the chat API
    entries = [
      typed(entry, dict, 'an entry of logprobs.content') for entry in read_list(record, 'content')
    ]
    pieces = [read_text(entry.get('token'), 'a token of logprobs') for entry in entries]
    logprobs = [entry.get('logprob') for entry in entries]
    listed = [entry.get('id') for entry in entries]
    if None not in listed:
      ids = [typed(token, int, 'an id of logprobs') for token in listed]
  else:
    pieces = [read_text(piece, 'a token of logprobs') for piece in read_list(record, 'tokens')]
    logprobs = read_list(record, 'token_logprobs')
  if len(pieces) != len(logprobs):
    raise ProtocolError(f'{len(pieces)} tokens have {len(logprobs)} logprobs')
  return pieces, [_logprob(value) for value in logprobs], ids


def _read_end(choice: Mapping[str, Any]) -> str:
  """Return what ended the reply, as in `Answer.end`.

  vLLM states the stop token or stop text as `stop_reason` (None is the end-of-text token), SGLang
  as `matched_stop`.
  """
  reason = read_text(choice.get('finish_reason'), 'finish_reason')
  if reason in ENDS:
    return ENDS[reason]
  if reason in ('abort', 'error'):  # the server gave this request up, such as to shut down
    raise ProtocolError(f'finish_reason is {reason!r}')
  if reason != 'stop':
    raise ContradictionError(
      f"Its finish_reason is {reason[:40]!r}, but it must be 'stop' or one of {', '.join(ENDS)}."
    )
  for name in ('stop_reason', 'matched_stop'):
    if name in choice:
      value = choice[name]
      if value is not None and type(value) not in (str, int):
        raise ProtocolError(f'{name} is not a text or a token id')
      return 'stop_text' if isinstance(value, str) else 'token'
  return 'unknown'


def _ids(choice: Mapping[str, Any], name: str) -> list[int] | None:
  ids = optional(choice, name, list)
  return None if ids is None else [typed(token, int, f'an entry of {name}') for token in ids]


def _count(usage: Mapping[str, Any], name: str) -> int | None:
  count = optional(usage, name, int)
  if count is not None and count < 0:
    raise ProtocolError(f'usage.{name} is negative')
  return count


def _logprob(value: Any) -> float:
  """Return a log-probability; NaN if it is missing."""
  if value is None:
    return math.nan
  if type(value) not in (int, float) or not abs(value) < sys.float_info.max:
    raise ProtocolError('a log-probability is not a finite number')
  return float(value)


# Comparing an answer with its request.


def check_answer(answer: Answer, request: Request, tokenizer: Any) -> None:
  """Check that an answer is one to this request.

  Args:
    answer: the answer.
    request: what was asked for.
    tokenizer: the served model's tokenizer.

  Raises:
    ContradictionError: if it is not; the message quotes both.
  """
  _check_prompt(answer, request)
  if answer.end == 'content_filter':
    return
  if answer.tokens is not None:
    _check_ids(answer.tokens, answer.text, request, tokenizer)
  _check_counts(answer, request)
  _check_end(answer, request, tokenizer)


def _check_prompt(answer: Answer, request: Request) -> None:
  """Check that the server read the prompt that was sent, neither cut nor wrapped in a template."""
  sent, read = len(request.prompt_tokens), answer.prompt_tokens
  other = answer.prompt_ids is not None and answer.prompt_ids != list(request.prompt_tokens)
  if other or read not in (None, sent):
    count = len(answer.prompt_ids or ()) if other else read
    raise ContradictionError(
      f'The server read {count} tokens{" (other ones)" if count == sent else ""} of a prompt of '
      f'{sent}. Set tokenizer to that of the served model and max_positions to at most the '
      "server's context, and let the server add no template or text to prompts."
    )


def _check_ids(tokens: list[int], text: str, request: Request, tokenizer: Any) -> None:
  if not ids_match_text(tokenizer, tokens, text, request):
    raise ContradictionError(
      f'Its text is {text[:80]!r}, but the tokenizer {request.tokenizer_name!r} decodes its tokens '
      f'{tokens[:12]} to another text. Set tokenizer to that of the served model.'
    )


def _check_counts(answer: Answer, request: Request) -> None:
  """Check the numbers of tokens and log-probabilities, and the latter's values."""
  sampled = answer.completion_tokens
  num_logprobs = len(answer.logprobs)
  if answer.tokens is not None:
    count = len(answer.tokens)
    if sampled not in (None, count):
      raise ContradictionError(f'It has {count} tokens, but its usage counts {sampled}.')
    if num_logprobs not in (0, count):
      raise ContradictionError(f'It has {count} tokens, but {num_logprobs} log-probabilities.')
    sampled = count
  if max(sampled or 0, num_logprobs) > request.max_tokens:
    raise ContradictionError(
      f'It has {max(sampled or 0, num_logprobs)} tokens, but the request asks for at most '
      f'{request.max_tokens}.'
    )
  if any(logprob > MAX_LOGPROB for logprob in answer.logprobs):
    raise ContradictionError(
      f'It has the log-probability {max(answer.logprobs)}, which is above 0.'
    )


def _check_end(answer: Answer, request: Request, tokenizer: Any) -> None:
  """Check that the reply ends as the answer says."""
  tokens = answer.tokens
  sampled = answer.completion_tokens if tokens is None else len(tokens)
  ended = tokens is not None and any(token in request.stop_token_ids for token in tokens)
  if answer.end == 'length':
    if sampled is not None and sampled < request.max_tokens and not ended:
      raise ContradictionError(
        f'It ends by length after {sampled} of {request.max_tokens} tokens, so the context of the '
        'server is shorter than max_positions. Lower max_positions.'
      )
  elif answer.end == 'stop_text':
    if not request.stop_texts:
      raise ContradictionError('It ends with a stop text, but the request has none.')
  elif tokens is not None and not ended:
    special = bool(tokens) and tokens[-1] in tokenizer.all_special_ids
    if not special and (answer.end == 'token' or not request.stop_texts):
      raise ContradictionError(
        f"Its finish_reason is 'stop', but its tokens {tokens[-12:]} end with no token or text "
        'that ends a reply. Set tokenizer to that of the served model.'
      )


def check_length(count: int, request: Request) -> None:
  """Check that the text of a reply is not much longer than its maximum number of tokens.

  Encoding a text again may give a few tokens more than were sampled, but not many more.

  Args:
    count: number of tokens of the text, encoded again.
    request: the request.

  Raises:
    ContradictionError: if it is longer.
  """
  if count > request.max_tokens * 5 // 4 + 16:
    raise ContradictionError(
      f'Its text has {count} tokens, but the request asks for at most {request.max_tokens}.'
    )


def ids_match_text(tokenizer: Any, tokens: Sequence[int], text: str, request: Request) -> bool:
  """Return whether token ids decode to the text that the server returned with them.

  If they do not, `tokenizer` is not that of the served model. White space and replacement
  characters are ignored, because servers write them differently.

  Args:
    tokenizer: the tokenizer that the config names.
    tokens: token ids of the reply.
    text: text of the reply. A server leaves out a stop token or stop text at its end.
    request: the request.
  """
  if not all(0 <= token < request.vocab_size for token in tokens):
    return False
  returned, decoded = _visible(text), _visible(decode(tokenizer, tokens))
  if returned == decoded:
    return True
  if tokens and tokens[-1] in request.stop_token_ids:
    if returned == _visible(decode(tokenizer, tokens[:-1])):
      return True
  rest = decoded.removeprefix(returned)
  return decoded.startswith(returned) and any(
    rest.startswith(_visible(stop)) for stop in request.stop_texts
  )


def _visible(text: str) -> str:
  return re.sub('[\\s\ufffd]', '', text)
