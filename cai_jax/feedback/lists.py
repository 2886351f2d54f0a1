"""Lists of texts in the requests of variants."""

import string
from collections.abc import Sequence

LETTERS = string.ascii_uppercase + string.ascii_lowercase  # each is one token in most tokenizers


def number_texts(opening: str, texts: Sequence[str]) -> str:
  """Return an opening and a numbered list, one text a line.

  Args:
    opening: the text before the list.
    texts: the entries.
  """
  return '\n'.join([opening, *(f'{number}. {text}' for number, text in enumerate(texts, 1))])


def letter_texts(opening: str, texts: Sequence[str]) -> str:
  """Return an opening and a list with the labels of `LETTERS`, one text a line.

  Args:
    opening: the text before the list.
    texts: at most as many entries as there are letters.
  """
  lines = (f'{letter}. {text}' for letter, text in zip(LETTERS, texts, strict=False))
  return '\n'.join([opening, *lines])
