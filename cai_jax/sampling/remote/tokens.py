"""Tokens and log-probabilities, reconstructed from a server's answer.

- A server that returns token ids (vLLM, llama.cpp): the completion has the sampled tokens, as with
  a model in memory.
- A server that returns text only: the text is encoded again, as plain text, never as control
  tokens. If a token ended the reply, the first of the turn's stop tokens is appended. If the server
  does not say whether a stop token or a stop text ended the reply and both are possible, the finish
  reason is 'stop_text', and the dialogue continues from the text. The token that marks the end of a
  reasoning model's reasoning is lost; such a model needs a server that returns ids.
- Log-probabilities are kept only if they belong to exactly these tokens and were computed before
  temperature and filters, because records store log P(token | all previous tokens; θ). Otherwise
  they are NaN, never an estimate.
"""

import math
from collections.abc import Sequence
from typing import Any

from cai_jax.sampling.remote.answers import Answer
from cai_jax.sampling.text import decode, find_stop_text, round_logprobs
from cai_jax.sampling.types import Completion


def reconstruct(
  answer: Answer,
  tokenizer: Any,
  stop_token_ids: Sequence[int],
  stop_texts: Sequence[str],
  keep_logprobs: bool = True,
) -> Completion:
  """Return the completion that an answer describes.

  Args:
    answer: the answer, which `check_answer` accepts.
    tokenizer: the served model's tokenizer.
    stop_token_ids: all tokens that end the reply.
    stop_texts: all texts that end the reply.
    keep_logprobs: whether the log-probabilities of the answer are those before temperature and
      filters.
  """
  if answer.end == 'content_filter':
    return Completion([], '', [], 'content_filter')
  if answer.tokens is not None:
    tokens = answer.tokens
    logprobs = list(answer.logprobs) or [math.nan] * len(tokens)
  else:
    tokens, logprobs = _encoded_tokens(answer, tokenizer, stop_token_ids)
  if not keep_logprobs:
    logprobs = [math.nan] * len(tokens)
  stop_index = next((i for i, token in enumerate(tokens) if token in stop_token_ids), None)
  if stop_index is not None:
    tokens, logprobs = tokens[: stop_index + 1], logprobs[: stop_index + 1]
  visible = tokens if stop_index is None else tokens[:-1]
  cut = find_stop_text(tokenizer, visible, stop_texts)
  if cut is not None:
    count, text = cut
    return Completion(tokens[:count], text, round_logprobs(logprobs[:count]), 'stop_text')
  text = decode(tokenizer, visible) if answer.tokens is not None else answer.text
  if stop_index is not None:
    reason = 'stop'
  elif answer.end == 'length':
    reason = 'length'
  elif answer.end == 'stop_text' or (answer.end == 'unknown' and stop_texts):
    reason = 'stop_text'
  else:
    reason = 'stop'
    # A token ended the reply, but the answer does not contain it.
    ends_with_special = bool(tokens) and tokens[-1] in tokenizer.all_special_ids
    if stop_token_ids and not ends_with_special:
      tokens, logprobs = [*tokens, stop_token_ids[0]], [*logprobs, math.nan]
  return Completion(tokens, text, round_logprobs(logprobs), reason)


def prompt_text(tokenizer: Any, context: Sequence[int]) -> str | None:
  """Return a text that a server encodes with the same control tokens as `context`.

  Args:
    tokenizer: the served model's tokenizer.
    context: token ids of the context.

  Returns:
    The text, without the beginning-of-text token if the tokenizer adds it itself; or None if there
    is no such text, because plain text in the context spells a control token.
  """
  whole = tokenizer.decode(context, skip_special_tokens=False, clean_up_tokenization_spaces=False)
  control = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
  expected = [token for token in context if token in control]
  # Servers add the beginning-of-text token if the tokenizer does.
  without_bos = whole.removeprefix(tokenizer.bos_token or '')
  for text in dict.fromkeys((without_bos, whole)):
    if [token for token in tokenizer.encode(text) if token in control] == expected:
      return text
  return None


def _encoded_tokens(
  answer: Answer, tokenizer: Any, stop_token_ids: Sequence[int]
) -> tuple[list[int], list[float]]:
  """Encode the answer's text and return its tokens and log-probabilities.

  The log-probabilities are kept if the server's pieces are exactly these tokens, and are NaN
  otherwise. If the server returned one more piece that spells a stop token, that token is appended.
  """
  tokens = tokenizer.encode(answer.text, add_special_tokens=False, split_special_tokens=True)
  count = len(tokens)
  if list(answer.pieces[:count]) != [decode(tokenizer, [token]) for token in tokens]:
    return tokens, [math.nan] * count
  next_piece = answer.pieces[count] if len(answer.pieces) > count else None
  for token in stop_token_ids:
    if next_piece == tokenizer.convert_ids_to_tokens(token):
      return [*tokens, token], list(answer.logprobs[: count + 1])
  return tokens, list(answer.logprobs[:count])
