"""A comparison of two responses to one prompt, and a response that was judged on its own."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from cai_jax.data.dialogues import check_prompt
from cai_jax.data.row_form import MAX_ID
from cai_jax.dialogue import Message
from cai_jax.runtime.errors import UserError, show
from cai_jax.runtime.text_files import check_characters


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
  """Two responses to one prompt, and which of them is better.

  The two responses keep the order of their file. If `probability` is below 0.5, `rejected` is
  probably the better one.

  Attributes:
    id: unique in its file.
    prompt: the dialogue, which ends with the user's turn.
    chosen: the text of the first response, without surrounding white space.
    rejected: the text of the second response, without surrounding white space.
    probability: that `chosen` is better, from 0 to 1.
    margin: score of `chosen` - score of `rejected`, or None if it is not known. If only `scores`
      are given, it is their difference.
    source: where the preference comes from, such as 'implied', 'hh_rlhf' or 'label'.
    scores: the scores of `chosen` and `rejected`, if they are known.
    truncated: for `chosen` and `rejected`, whether the text was cut off at a length limit.

  Raises:
    UserError: if an attribute does not have this form, a text is blank, or both are the same.
  """

  id: str
  prompt: tuple[Message, ...]
  chosen: str
  rejected: str
  probability: float = 1.0
  margin: float | None = None
  source: str = ''
  scores: tuple[float, float] | None = None
  truncated: tuple[bool, bool] = (False, False)

  def __post_init__(self) -> None:
    _check(self.id, self.prompt, {'chosen': self.chosen, 'rejected': self.rejected})
    if self.chosen == self.rejected:
      raise UserError(f'chosen and rejected are the same text: {show(self.chosen)}.')
    if not is_number(self.probability) or not 0 <= self.probability <= 1:
      raise UserError(f'probability must be a number from 0 to 1, but got {self.probability!r}.')
    if self.scores is not None and self.margin is None:
      object.__setattr__(self, 'margin', self.scores[0] - self.scores[1])
    for name, number in (('margin', self.margin), *_named(self.scores)):
      if number is not None and not is_number(number):
        raise UserError(f'{name} must be a finite number, but got {number!r}.')

  @property
  def better(self) -> int | None:
    """0 if `chosen` is probably better, 1 if `rejected` is, None if both are equally likely."""
    return None if self.probability == 0.5 else int(self.probability < 0.5)

  @property
  def texts(self) -> tuple[str, ...]:
    """The responses."""
    return self.chosen, self.rejected

  @property
  def verdict(self) -> int | None:
    """Which response is better if they are sorted by their texts: 0, 1 or None."""
    return None if self.better is None else self.better ^ (self.chosen > self.rejected)


@dataclasses.dataclass(frozen=True, slots=True)
class JudgedResponse:
  """A response to a prompt that was judged on its own, as KTO learns from it.

  Attributes:
    id: unique in its file.
    prompt: the dialogue, which ends with the user's turn.
    response: the text of the response, without surrounding white space.
    desirable: whether the response is good.
    source: where the judgement comes from.
    truncated: whether the text was cut off at a length limit.

  Raises:
    UserError: if an attribute does not have this form, or the text is blank.
  """

  id: str
  prompt: tuple[Message, ...]
  response: str
  desirable: bool
  source: str = ''
  truncated: bool = False

  def __post_init__(self) -> None:
    _check(self.id, self.prompt, {'response': self.response})
    if not isinstance(self.desirable, bool):
      raise UserError(f'desirable must be true or false, but got {self.desirable!r}.')

  @property
  def texts(self) -> tuple[str, ...]:
    """The response."""
    return (self.response,)

  @property
  def verdict(self) -> int:
    """1 if the response is desirable, else 0."""
    return int(self.desirable)


def judge_both(comparisons: Iterable[Comparison]) -> Iterator[JudgedResponse]:
  """Yield both responses of each comparison: the better one as desirable, the other one as not.

  A comparison with the probability 0.5 says nothing about either response, so it yields none.

  Args:
    comparisons: the comparisons.
  """
  for pair in comparisons:
    if pair.better is None:
      continue
    for side, text in enumerate((pair.chosen, pair.rejected)):
      yield JudgedResponse(
        f'{pair.id}/{("chosen", "rejected")[side]}',
        pair.prompt,
        text,
        side == pair.better,
        pair.source,
        pair.truncated[side],
      )


def is_number(value: Any) -> bool:
  """Return whether a value is a finite number; True and False are not numbers.

  Args:
    value: any value.
  """
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _named(scores: tuple[float, float] | None) -> list[tuple[str, Any]]:
  names = ('score_chosen', 'score_rejected')
  return list(zip(names, scores, strict=True)) if scores is not None else []


def _check(name: Any, prompt: Sequence[Message], texts: dict[str, Any]) -> None:
  """Check what comparisons and judged responses have in common."""
  if not isinstance(name, str) or not name or not name.isprintable() or len(name) > MAX_ID:
    raise UserError(
      f'An id must be printable text of 1 to {MAX_ID} characters, but got {show(name)}.'
    )
  check_prompt(prompt)
  for field, text in texts.items():
    if not isinstance(text, str) or not text.strip():
      raise UserError(f'{field} must be non-blank text, but got {show(text)}.')
    check_characters(field, text)
