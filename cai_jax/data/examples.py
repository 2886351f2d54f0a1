"""Training examples from rows of D_CAI: token ids with a loss mask."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from cai_jax.data import quality
from cai_jax.dialogue import Dialogue
from cai_jax.runtime.errors import UserError

HELPFUL = 'helpful'  # `kind` of the rows whose initial response can be mixed in
INITIAL = -1  # number of the "round" of the initial response, as in `quality.find_row_flags`


class Example(NamedTuple):
  """One training sequence.

  Attributes:
    tokens: i32[T].
    loss_mask: bool[T], true on the tokens to learn.
    id: id of the row of D_CAI that the example was made from.
  """

  tokens: np.ndarray
  loss_mask: np.ndarray
  id: str = ''


@dataclasses.dataclass(frozen=True)
class ExampleSet:
  """Examples and how they were chosen.

  Attributes:
    examples: the examples that were kept.
    counts: how many `rows` there were, how many examples were `kept`, how many of these are
      `helpful`, and how many were `dropped`, by reason.
  """

  examples: tuple[Example, ...]
  counts: dict[str, Any]


def build_examples(
  rows: Sequence[Mapping[str, Any]],
  dialogue: Dialogue,
  *,
  target: str = 'last',
  helpfulness_share: float = 0.0,
  max_length: int = 1024,
  drop_truncated: bool = True,
  reasoning: str = 'drop',
  filters: Sequence[str] = (),
  references: quality.References | None = None,
  seed: int = 0,
) -> ExampleSet:
  """Return training examples in the order of the rows, with helpfulness examples at the end.

  Args:
    rows: each has `id`, `kind`, `prompt` (messages), `initial` {text, finish_reason} and `rounds`,
      a list of {revision: {text, finish_reason}}. These may also have `thoughts`.
    dialogue: renders conversations as tokens.
    target: which texts of a row to learn, unless its kind is 'helpful': the 'last' revision, 'all'
      revisions, or the 'initial' response.
    helpfulness_share: share of all examples that are initial responses of rows of kind 'helpful'.
      The seed chooses these rows. Other rows of this kind are not used.
    max_length: maximum number of tokens; longer examples are dropped.
    drop_truncated: whether to drop texts that were cut off at the length limit. If not, they are
      learned as if they were complete.
    reasoning: whether to 'drop' the thoughts of a text, and learn the text as the chat template
      renders it, or to 'keep' them, and learn both. A reply that ended inside its thoughts is
      dropped and counted as 'unfinished_thought'.
    filters: names of `quality.FLAGS`. A text with one of these defects is dropped and counted as
      'filtered_' plus the first defect in the given order. The rows do not change.
    references: texts of the constitution that a response may have copied; some filters need them.
    seed: chooses the helpfulness examples.

  Raises:
    UserError: if no example remains, if there are too few helpfulness examples, if a filter needs
      `references`, or if there are no thoughts to keep.
  """
  filters = [quality.RENAMED.get(name, name) for name in filters]
  needing = [name for name in filters if name in quality.NEEDS_REFERENCES]
  if needing and references is None:
    raise UserError(
      f'train.filters: {", ".join(needing)} compares texts with the constitution. Pass '
      '`references`, which `quality.build_references` makes from a constitution.'
    )
  if reasoning == 'keep' and len(rows) and 'thoughts' not in rows[0]['initial']:
    raise UserError(
      "train.reasoning='keep' learns thoughts, but this D_CAI has none. Use train.reasoning='drop' "
      'or generate with a reasoning model that may think.'
    )
  kept: list[Example] = []
  helpful: list[Example] = []
  dropped: collections.Counter[str] = collections.Counter()
  for i in range(len(rows)):
    row = rows[i]
    is_helpful = row['kind'] == HELPFUL
    if is_helpful and not helpfulness_share:
      dropped['helpful_not_asked_for'] += 1
      continue
    rounds = _target_rounds(row, is_helpful, target)
    if not rounds:
      dropped['no_revision'] += 1
    for number in rounds:
      reason = _find_filter(row, number, filters, references)
      example = reason or _make_example(
        row, number, dialogue, max_length, drop_truncated, reasoning
      )
      if isinstance(example, str):
        dropped[example] += 1
      else:
        (helpful if is_helpful else kept).append(example)
  num_helpful = round(helpfulness_share * len(kept) / (1 - helpfulness_share))
  if num_helpful > len(helpful):
    raise UserError(
      f'train.helpfulness_share={helpfulness_share} with {len(kept)} other examples needs '
      f'{num_helpful} helpfulness examples, but the dataset has {len(helpful)}. Generate responses '
      'to more helpful prompts, or lower the share.'
    )
  if not kept:
    raise UserError(
      f'No example remains of {len(rows)} rows for train.target={target!r}; dropped: '
      f"{dict(dropped)}. 'truncated' means cut at sampling.*.max_tokens (raise it, or set "
      f"train.drop_truncated=False), 'too_long' means more than train.max_length={max_length} "
      f"tokens, and 'filtered_' means a defect in train.filters={tuple(filters)}."
    )
  if helpful:
    chosen = np.sort(np.random.default_rng([seed, 1]).permutation(len(helpful))[:num_helpful])
    dropped['helpful_beyond_share'] += len(helpful) - num_helpful
    helpful = [helpful[i] for i in chosen]
  counts = {
    'rows': len(rows),
    'kept': len(kept) + len(helpful),
    'helpful': len(helpful),
    'dropped': {reason: n for reason, n in sorted(dropped.items()) if n},
  }
  return ExampleSet(tuple(kept + helpful), counts)


class Identified(Protocol):
  """What has the id of a row: an `Example` or a `Unit`."""

  @property
  def id(self) -> str:
    """The id of the row."""
    ...


T = TypeVar('T', bound=Identified)


def hold_out(
  examples: Sequence[T],
  share: float,
  seed: int,
  groups: Mapping[str, int] | None = None,
  section: str = 'train',
) -> tuple[tuple[T, ...], tuple[T, ...]]:
  """Split examples, or units, into those to train on and those to hold out.

  All examples of one row are on the same side, and so are all rows of one group.

  Args:
    examples: the examples to split.
    share: share of the rows to hold out, at least one row; 0 holds out none.
    seed: chooses the rows.
    groups: group of each row by its id, such as near-duplicates; by default each is its own.
    section: section of the config that has the share, for messages.

  Raises:
    UserError: if nothing remains to train on.
  """
  if not share:
    return tuple(examples), ()
  rows = list(dict.fromkeys(example.id for example in examples))
  members: dict[int | str, list[str]] = {}
  for row in rows:
    members.setdefault(groups[row] if groups else row, []).append(row)
  count = max(round(share * len(rows)), 1)
  if count >= len(rows):
    raise UserError(
      f'{section}.eval_share={share} of {len(rows)} rows leaves none to train on. Lower it.'
    )
  chosen: set[str] = set()
  together = list(members.values())
  for i in np.random.default_rng([seed, 2]).permutation(len(together)):
    if len(chosen) + len(together[i]) <= count:
      chosen.update(together[i])
  if not chosen:
    raise UserError(
      f'{section}.eval_share={share} of {len(rows)} rows is smaller than every group of '
      'near-duplicate prompts. Raise it, or set it to 0.'
    )
  return (
    tuple(example for example in examples if example.id not in chosen),
    tuple(example for example in examples if example.id in chosen),
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
