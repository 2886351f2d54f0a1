"""The examples of single rows of D_CAI, in a form that worker processes can be given."""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cai_jax.data import quality
from cai_jax.data.unit_table import Part, make_part
from cai_jax.data.units import Example
from cai_jax.dialogue import Dialogue
from cai_jax.runtime.errors import UserError

HELPFUL = 'helpful'  # `kind` of the rows whose initial response can be mixed in
INITIAL = -1  # number of the "round" of the initial response, as in `quality.find_row_flags`


@dataclasses.dataclass(frozen=True)
class ExampleMaker:
  """What turns a row of D_CAI into examples. The arguments are those of `build_examples`.

  Args:
    dialogue: renders conversations as tokens.
    target: which texts of a row to learn.
    with_helpful: whether to learn the initial responses of rows of kind 'helpful'.
    max_length: maximum number of tokens.
    drop_truncated: whether to drop texts that were cut off.
    reasoning: what to do with thoughts.
    filters: names of defects.
    references: texts of the constitution that a response may have copied.
  """

  dialogue: Dialogue
  target: str
  with_helpful: bool
  max_length: int
  drop_truncated: bool
  reasoning: str
  filters: tuple[str, ...]
  references: quality.References | None

  @property
  def digest(self) -> str:
    """A hex digest of all that the examples of a row depend on, besides the row and this code."""
    settings = [getattr(self, field.name) for field in dataclasses.fields(self)[1:-1]]
    texts: Any = None
    if self.references is not None:
      requests = self.references.requests.items()
      texts = [
        [[name, [sorted(grams) for grams in some]] for name, some in requests],
        [sorted(grams) for grams in self.references.demonstrations],
      ]
    content = json.dumps([self.dialogue.digest, settings, texts])
    return hashlib.sha256(content.encode()).hexdigest()

  def make_part(self, rows: Sequence[Mapping[str, Any]], begin: int, end: int) -> Part:
    """Return the examples of some rows, marked with whether they are `HELPFUL`.

    Args:
      rows: all rows.
      begin, end: range of the rows to use.

    Raises:
      UserError: if a row cannot be rendered; the message names it.
    """
    examples: list[Example] = []
    helpful: list[bool] = []
    dropped: collections.Counter[str] = collections.Counter()
    for i in range(begin, end):
      row = rows[i]
      try:
        made = list(self._make(row))
      except UserError as error:
        raise UserError(f'row {i} (id {row["id"]!r}): {error}') from error
      for example in made:
        if isinstance(example, str):
          dropped[example] += 1
        else:
          examples.append(example)
          helpful.append(row['kind'] == HELPFUL)
    return make_part(examples, {HELPFUL: helpful}, dropped)

  def _make(self, row: Mapping[str, Any]) -> Iterator[Example | str]:
    """Yield the examples of a row, and the reason to drop each other one."""
    is_helpful = row['kind'] == HELPFUL
    if is_helpful and not self.with_helpful:
      yield 'helpful_not_asked_for'
      return
    rounds = _target_rounds(row, is_helpful, self.target)
    if not rounds:
      yield 'no_revision'
    for number in rounds:
      reason = _find_filter(row, number, self.filters, self.references)
      yield reason or _make_example(
        row, number, self.dialogue, self.max_length, self.drop_truncated, self.reasoning
      )


def _target_rounds(row: Mapping[str, Any], is_helpful: bool, target: str) -> list[int]:
  """Return the rounds of a row whose revisions are learned, or [INITIAL]."""
  if is_helpful or target == 'initial':
    return [INITIAL]
  rounds = list(range(len(row['rounds'])))
  return rounds[-1:] if target == 'last' else rounds


def _find_filter(
  row: Mapping[str, Any],
  number: int,
  filters: Sequence[str],
  references: quality.References | None,
) -> str | None:
  """Return the reason to filter out the text of a round, if there is one."""
  if not filters:
    return None
  defects = quality.find_row_flags(row, number, references)
  return next((f'filtered_{name}' for name in filters if name in defects), None)


def _make_example(
  row: Mapping[str, Any],
  number: int,
  dialogue: Dialogue,
  max_length: int,
  drop_truncated: bool,
  reasoning: str,
) -> Example | str:
  """Return the example for the text of a round, or the reason to drop it."""
  response = row['initial'] if number == INITIAL else row['rounds'][number]['revision']
  thoughts = response.get('thoughts', '')
  if not response['text'].strip():
    return 'unfinished_thought' if thoughts else 'empty'
  if drop_truncated and response['finish_reason'] == 'length':
    return 'truncated'
  messages = [{'role': m['role'], 'content': m['content']} for m in row['prompt']]
  tokens, mask = dialogue.example(
    [*messages, {'role': 'assistant', 'content': response['text']}],
    thoughts if reasoning == 'keep' else '',
  )
  if len(tokens) > max_length:
    return 'too_long'
  return Example(np.asarray(tokens, np.int32), np.asarray(mask, bool), row['id'])
