"""The answer of a chat API: text, and how many tokens it took."""

import math
from collections.abc import Sequence
from typing import Any

from cai_jax.sampling.remote.answers import (
  Answer,
  read_choice,
  read_usage,
)
from cai_jax.sampling.remote.fields import parse_body, read_text, typed
from cai_jax.sampling.types import Completion

_REASONS = {'length': 'length', 'stop_text': 'stop_text', 'content_filter': 'content_filter'}


def read_chat_answer(data: bytes) -> Answer:
  """Parse the body of a response in a chat.

  Args:
    data: the body.

  Returns:
    The answer. If the model has refused in the field for refusals, that is its text. A reply that
    the limit cut inside its hidden reasoning has the text ''.

  Raises:
    ProtocolError: if it does not follow the API.
    ContradictionError: if it does, but has several choices or an unknown finish reason.
  """
  content = parse_body(data)
  (choice, end), usage = read_choice(content), read_usage(content)
  message = {} if end == 'content_filter' else typed(choice.get('message'), dict, 'message')
  texts = [message[name] for name in ('content', 'refusal') if message.get(name) is not None]
  text = read_text(texts[0], 'the content of message') if texts else ''
  return Answer(
    text,
    end,
    prompt_tokens=usage.prompt_tokens,
    completion_tokens=usage.completion_tokens,
    cached_tokens=usage.cached_tokens,
  )


def chat_completion(answer: Answer, tokenizer: Any, stop_texts: Sequence[str]) -> Completion:
  """Return the completion of a chat's answer, without log-probabilities.

  Its ids are those of its text by a tokenizer of ours, encoded as plain text. They count tokens; no
  model has sampled them, and none reads them.

  Args:
    answer: the answer, from `read_chat_answer`. Its number of tokens is not compared with the limit
      of the request, because servers differ in how they count hidden reasoning.
    tokenizer: the tokenizer that the config names.
    stop_texts: all texts that end the reply. Those for which the request had no room are cut off
      here.
  """
  ends = [answer.text.find(stop) for stop in stop_texts if stop in answer.text]
  text = answer.text[: min(ends, default=len(answer.text))]
  tokens = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
  reason = 'stop_text' if ends else _REASONS.get(answer.end, 'stop')
  return Completion(tokens, text, [math.nan] * len(tokens), reason)
