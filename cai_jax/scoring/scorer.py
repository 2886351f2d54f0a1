"""What rates a response: the types of scorers and measures."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol


class Verdict(Protocol):
  """What a scorer finds in one response."""

  violations: frozenset[str]  # rules that it breaks
  helpful: bool  # whether it answers the request


Scorer = Callable[[Sequence[Mapping[str, str]], str], Verdict]  # of a prompt's messages and a text


# Of the messages of prompts and a text for each: a number for each. A share's name ends in `_rate`.
Measure = Callable[[Sequence[Sequence[Mapping[str, str]]], Sequence[str]], list[float]]
