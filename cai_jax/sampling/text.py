"""Decode sampled tokens, find stop texts and round log-probabilities."""

from collections.abc import Sequence
from typing import Any


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
  """Return the text of `tokens` without control tokens.

  Args:
    tokenizer: the tokenizer of `tokens`.
    tokens: token ids of a reply.
  """
  return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def find_stop_text(
  tokenizer: Any, tokens: Sequence[int], stop_texts: Sequence[str], num_checked: int = 0
) -> tuple[int, str] | None:
  """Find the first token that completes a stop text.

  Args:
    tokenizer: the tokenizer of `tokens`.
    tokens: token ids of a reply.
    stop_texts: texts that end the reply.
    num_checked: number of leading tokens that were checked before and complete no stop text.

  Returns:
    The number of tokens up to and including that token, and the text before the stop text; or
    None if the reply has no stop text.
  """
  whole = decode(tokenizer, tokens) if stop_texts else ''
  if not any(stop in whole for stop in stop_texts):
    return None
  for count in range(num_checked + 1, len(tokens) + 1):
    text = decode(tokenizer, tokens[:count])
    starts = [text.find(stop) for stop in stop_texts if stop in text]
    if starts:
      return count, text[: min(starts)]
  return None


def round_logprobs(logprobs: Sequence[float]) -> list[float]:
  """Round log-probabilities to nine significant digits, which represent every f32 exactly.

  Args:
    logprobs: log-probabilities in nats.
  """
  return [float(f'{x:.9g}') for x in logprobs]
