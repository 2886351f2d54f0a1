"""Write the answers of the completions and chat API.

Their fields are those of OpenAI's API reference. As in vLLM, a choice also has `stop_reason` (None
for the end of a turn, or the stop token or stop text that ended the reply), and `token_ids` and
`prompt_token_ids` if the request asks for token ids.
"""

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cai_jax.sampling.text import decode, round_logprobs
from cai_jax.sampling.types import Completion
from cai_jax.scoring.positions import Scored
from cai_jax.serving.protocol import Settings

_PREFIXES = {'text_completion': 'cmpl', 'chat.completion': 'chatcmpl'}  # of the ids of answers
_FINISH = {'stop': 'stop', 'stop_text': 'stop', 'length': 'length'}


class Choice(NamedTuple):
  """A reply to a prompt.

  Attributes:
    context: token ids of the prompt.
    completion: the reply; without tokens if none was asked for.
    scored: the log-probabilities of the context and the reply, if they were asked for.
  """

  context: Sequence[int]
  completion: Completion
  scored: Scored | None = None

  @property
  def tokens(self) -> list[int]:
    """Token ids of the context and the reply."""
    return [*self.context, *self.completion.tokens]


class Likely(NamedTuple):
  """A token, its log-probability in nats, and the most likely tokens in its place.

  Attributes:
    token: the token id.
    logprob: its log-probability; None at the first token of a text.
    alternatives: (token id, log-probability) in descending order.
  """

  token: int
  logprob: float | None
  alternatives: list[tuple[int, float]]


def likely_tokens(choice: Choice, alternatives: int, echo: bool) -> list[Likely]:
  """Return the tokens of a choice with their log-probabilities.

  Args:
    choice: the choice.
    alternatives: number of most likely tokens to list at each position.
    echo: whether to begin with the tokens of the context.
  """
  tokens = choice.tokens
  start = 0 if echo else len(choice.context)
  if choice.scored is None:
    completion = choice.completion
    pairs = zip(completion.tokens, completion.logprobs, strict=True)
    return [Likely(token, logprob, []) for token, logprob in pairs]
  logprobs = round_logprobs(choice.scored.logprobs.tolist())
  ids = choice.scored.top_ids[:, :alternatives].tolist()
  values = choice.scored.top_logprobs[:, :alternatives].tolist()
  result = []
  for place in range(start, len(tokens)):
    if place == 0:
      result.append(Likely(tokens[0], None, []))
      continue
    listed = zip(ids[place - 1], round_logprobs(values[place - 1]), strict=True)
    result.append(Likely(tokens[place], logprobs[place], list(listed)))
  return result


def with_reply(scored: Scored, logprob: float) -> Scored:
  """Return the scores of a context and its most likely next token, which ends the text.

  Args:
    scored: the scores of the context.
    logprob: log-probability of the token in nats.
  """
  logprobs = np.append(scored.logprobs, np.float32(logprob))
  return scored._replace(logprobs=logprobs)


def spell(tokenizer: Any, tokens: Sequence[int]) -> str:
  """Return the text of tokens, with the spelling of control tokens.

  Args:
    tokenizer: the model's tokenizer.
    tokens: token ids.
  """
  return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def completion_logprobs(piece_of: Callable[[int], str], likely: Sequence[Likely]) -> dict[str, Any]:
  """Return `logprobs` of a choice of the completions API.

  Args:
    piece_of: maps a token id to its text.
    likely: the tokens.
  """
  pieces = [piece_of(entry.token) for entry in likely]
  offsets, offset = [], 0
  tops: list[dict[str, float] | None] = []
  for piece, entry in zip(pieces, likely, strict=True):
    offsets.append(offset)
    offset += len(piece)
    if entry.logprob is None:
      tops.append(None)
      continue
    # Tokens may have the same spelling. The most likely one is written last and stays, so that the
    # largest value is that of the most likely token.
    ascending = [(piece, entry.logprob)]
    ascending += [(piece_of(token), value) for token, value in entry.alternatives[::-1]]
    tops.append(dict(ascending))
  return {
    'tokens': pieces,
    'token_logprobs': [entry.logprob for entry in likely],
    'top_logprobs': tops,
    'text_offset': offsets,
  }


def chat_logprobs(piece_of: Callable[[int], str], likely: Sequence[Likely]) -> dict[str, Any]:
  """Return `logprobs` of a choice of the chat API.

  Args:
    piece_of: maps a token id to its text.
    likely: the tokens of the reply.
  """

  def entry(token: int, logprob: float | None) -> dict[str, Any]:
    piece = piece_of(token)
    # A token that is part of a character has no text of its own.
    data = None if '\ufffd' in piece else list(piece.encode())
    return {'token': piece, 'logprob': logprob, 'bytes': data}

  return {
    'content': [
      entry(one.token, one.logprob)
      | {'top_logprobs': [entry(token, value) for token, value in one.alternatives]}
      for one in likely
    ]
  }


def choice_fields(
  choice: Choice, index: int, tokenizer: Any, stops: Sequence[str], settings: Settings
) -> dict[str, Any]:
  """Return the fields that choices of both APIs have.

  Args:
    choice: the choice.
    index: its number in the answer.
    tokenizer: the model's tokenizer.
    stops: the texts that end a reply, those of the model and of the request.
    settings: what the request asks for. Only its own stop tokens are given as reasons.
  """
  completion = choice.completion
  reason: int | str | None = None
  if completion.finish_reason == 'stop_text':
    whole = decode(tokenizer, completion.tokens)
    reason = min((stop for stop in stops if stop in whole), key=whole.find)
  elif (
    completion.finish_reason == 'stop' and completion.tokens[-1] in settings.sampling.stop_token_ids
  ):
    reason = completion.tokens[-1]
  fields: dict[str, Any] = {
    'index': index,
    'finish_reason': _FINISH[completion.finish_reason],
    'stop_reason': reason,
  }
  if settings.return_ids:
    fields |= {'token_ids': completion.tokens, 'prompt_token_ids': list(choice.context)}
  return fields


def envelope(
  kind: str, model: str, fingerprint: str, choices: Sequence[Mapping[str, Any]], counts: Sequence
) -> dict[str, Any]:
  """Return an answer.

  Args:
    kind: value of `object`, a key of `_PREFIXES`.
    model: the name that the model is served under.
    fingerprint: identifies the weights.
    choices: the choices.
    counts: numbers of tokens of all prompts and of all replies.
  """
  return {
    'id': f'{_PREFIXES[kind]}-{uuid.uuid4().hex}',
    'object': kind,
    'created': int(time.time()),
    'model': model,
    'system_fingerprint': fingerprint,
    'choices': list(choices),
    'usage': {
      'prompt_tokens': counts[0],
      'completion_tokens': counts[1],
      'total_tokens': sum(counts),
    },
  }
