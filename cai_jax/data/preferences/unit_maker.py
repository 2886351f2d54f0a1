"""The units of single comparisons and judged responses, in a form that workers can be given."""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from cai_jax.data.preferences.comparisons import Comparison, JudgedResponse
from cai_jax.data.preferences.forms import digest64
from cai_jax.data.unit_table import Part, make_part
from cai_jax.data.units import Example, Unit
from cai_jax.dialogue import Dialogue
from cai_jax.runtime.errors import UserError

PROMPT = 'prompt'  # value of the pieces of a judged response: two halves of a hash of its prompt


class Render(Protocol):
  """What renders a comparison. Workers get a copy, so it can be pickled."""

  @property
  def digest(self) -> str:
    """A digest of all that a segment depends on, besides the comparison and the code of `data`."""
    ...

  def __call__(self, pair: Comparison) -> tuple[Example, ...]:
    """Return the segments of a comparison, `chosen` and `rejected`."""
    ...


@dataclasses.dataclass(frozen=True)
class RenderReplies:
  """Renders both responses as supervised examples, with the prompt before each."""

  dialogue: Dialogue

  @property
  def digest(self) -> str:
    """A hex digest of the dialogue."""
    return self.dialogue.digest

  def __call__(self, pair: Comparison) -> tuple[Example, ...]:
    """Return the segments of a comparison."""
    context = _context(self.dialogue, pair.prompt)
    return tuple(_join(context, _target(self.dialogue, text), pair.id) for text in pair.texts)


@dataclasses.dataclass(frozen=True)
class ComparisonMaker:
  """What turns comparisons into units. The arguments are those of `build_comparison_units`.

  Args:
    render: renders a comparison.
    max_length: maximum number of tokens of a unit.
    drop_truncated: whether to drop comparisons with a text that was cut off.
    margins: whether the units have margins.
  """

  render: Render
  max_length: int
  drop_truncated: bool
  margins: bool

  @property
  def digest(self) -> str:
    """A hex digest of all that a unit depends on, besides the comparison and this code."""
    settings = ['comparison', self.max_length, self.drop_truncated, self.margins]
    return hashlib.sha256(json.dumps([self.render.digest, settings]).encode()).hexdigest()

  def make_part(self, comparisons: Iterable[Comparison]) -> Part:
    """Return the units of some comparisons.

    Args:
      comparisons: the comparisons.

    Raises:
      UserError: if a comparison has no margin although `margins` is set.
    """
    dropped: collections.Counter[str] = collections.Counter()
    return make_part(self._make_each(comparisons, dropped), counts=dropped)

  def _make_each(
    self, comparisons: Iterable[Comparison], dropped: collections.Counter[str]
  ) -> Iterator[Unit]:
    """Yield the unit of each comparison, and count in `dropped` why others have none."""
    for pair in comparisons:
      if self.margins and pair.margin is None:
        raise UserError(
          f'The comparison {pair.id!r} has no margin. Give each row `margin`, or `score_chosen` '
          'and `score_rejected`, or train without a margin.'
        )
      if self.drop_truncated and any(pair.truncated):
        dropped['truncated'] += 1
        continue
      values = {'probability': (pair.probability, 1 - pair.probability)}
      if self.margins and pair.margin is not None:
        values['margin'] = (pair.margin, -pair.margin)
      unit = Unit(self.render(pair), values, pair.id)
      if unit.length > self.max_length:
        dropped['too_long'] += 1
      else:
        yield unit


@dataclasses.dataclass(frozen=True)
class JudgedMaker:
  """What turns judged responses into pieces of units: the prompt, and the response.

  Args:
    dialogue: renders conversations as tokens.
    drop_truncated: whether to drop responses that were cut off.
  """

  dialogue: Dialogue
  drop_truncated: bool

  @property
  def digest(self) -> str:
    """A hex digest of all that the pieces depend on, besides the response and this code."""
    content = [self.dialogue.digest, 'judged', self.drop_truncated]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()

  def make_part(self, responses: Iterable[JudgedResponse]) -> Part:
    """Return two pieces for each response, with the values 'desirable' and `PROMPT`.

    Args:
      responses: the judged responses.
    """
    dropped: collections.Counter[str] = collections.Counter()
    return make_part(self._make_each(responses, dropped), counts=dropped)

  def _make_each(
    self, responses: Iterable[JudgedResponse], dropped: collections.Counter[str]
  ) -> Iterator[Unit]:
    for judged in responses:
      if self.drop_truncated and judged.truncated:
        dropped['truncated'] += 1
        continue
      context = _context(self.dialogue, judged.prompt)
      target = _target(self.dialogue, judged.response)
      high, low = divmod(digest64(list(judged.prompt)), 2**32)  # a float holds each of them
      values = {'desirable': (float(judged.desirable), 0.0), PROMPT: (float(high), float(low))}
      pieces = (
        Example(context, np.zeros(len(context), bool), judged.id),
        Example(target, np.ones(len(target), bool), judged.id),
      )
      yield Unit(pieces, values, judged.id)


def _context(dialogue: Dialogue, prompt: Sequence[dict[str, Any]]) -> np.ndarray:
  """Return the tokens before a response, i32[C]."""
  return np.asarray(dialogue.prompt(prompt), np.int32)


def _target(dialogue: Dialogue, text: str) -> np.ndarray:
  """Return the tokens of a response and the one that ends it, i32[T]."""
  return np.asarray(dialogue.reply(text), np.int32)


def _join(context: np.ndarray, target: np.ndarray, name: str) -> Example:
  """Return a segment, as `Dialogue.example` makes it: only the target is learned."""
  mask = np.arange(len(context) + len(target)) >= len(context)
  return Example(np.concatenate([context, target]), mask, name)
