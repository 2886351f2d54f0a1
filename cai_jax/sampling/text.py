"""The text of sampled tokens, and where a stop text ends it."""

from collections.abc import Sequence


def decode(tokenizer, tokens: Sequence[int]) -> str:
  """The text of tokens, control tokens left out."""
  return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def first_stop_text(
  tokenizer, tokens: Sequence[int], texts: Sequence[str], clean: int = 0
) -> tuple[int, str] | None:
  """(tokens up to the one that completes a stop text first, text before it), or None.

  Args:
    tokenizer: of the tokens.
    tokens: of a reply.
    texts: that end it.
    clean: how many of the tokens are known to complete none.
  """
  whole = decode(tokenizer, tokens) if texts else ''
  if not any(stop in whole for stop in texts):
    return None
  for count in range(clean + 1, len(tokens) + 1):
    text = decode(tokenizer, tokens[:count])
    places = [text.find(stop) for stop in texts if stop in text]
    if places:
      return count, text[: min(places)]
  return None


def rounded(logprobs: Sequence[float]) -> list[float]:
  """Log-probabilities as journal and D_CAI keep them: nine digits are all that f32 has."""
  return [float(f'{x:.9g}') for x in logprobs]
