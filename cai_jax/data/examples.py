"""Training examples from rows of D_CAI: token ids with a loss mask."""

import collections
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cai_jax.data import quality
from cai_jax.data.d_cai import content_digest
from cai_jax.data.d_cai_rows import Rows
from cai_jax.data.example_maker import HELPFUL, ExampleMaker
from cai_jax.data.part_files import map_parts
from cai_jax.data.unit_table import UnitTable
from cai_jax.data.units import choose_items, item_ids
from cai_jax.dialogue import Dialogue
from cai_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class ExampleSet:
  """Examples and how they were chosen.

  Attributes:
    examples: the examples that were kept.
    counts: how many `rows` there were, how many examples were `kept`, how many of these are
      `helpful`, and how many were `dropped`, by reason.
  """

  examples: UnitTable
  counts: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Stored:
  """The rows of a D_CAI as the source of parts. Each worker reads its own from the files."""

  rows: Rows

  @property
  def digest(self) -> str:
    return json.dumps([content_digest(self.rows.folder), self.rows.split])

  def __len__(self) -> int:
    return len(self.rows)

  def batches(self, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[Rows, int, int]]:
    return ((self.rows, begin, end) for begin, end in ranges)


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
  folder: str | os.PathLike | None = None,
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
    folder: where to keep the tokens in files, see `part_files.map_parts`; the rows are then
      `d_cai.Rows`, and all processes call this function together. None keeps them in memory.

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
  maker = ExampleMaker(
    dialogue,
    target,
    bool(helpfulness_share),
    max_length,
    drop_truncated,
    reasoning,
    tuple(filters),
    references,
  )
  if folder is None:
    parts = [maker.make_part(rows, 0, len(rows))]
  else:
    assert isinstance(rows, Rows)
    parts = map_parts(_Stored(rows), maker, folder)
  is_helpful = np.concatenate([part.marks[HELPFUL] for part in parts])
  kept, helpful = np.flatnonzero(~is_helpful), np.flatnonzero(is_helpful)
  dropped: collections.Counter[str] = collections.Counter()
  for part in parts:
    dropped.update(part.counts)
  num_helpful = round(helpfulness_share * len(kept) / (1 - helpfulness_share))
  if num_helpful > len(helpful):
    raise UserError(
      f'train.helpfulness_share={helpfulness_share} with {len(kept)} other examples needs '
      f'{num_helpful} helpfulness examples, but the dataset has {len(helpful)}. Generate responses '
      'to more helpful prompts, or lower the share.'
    )
  if not len(kept):
    raise UserError(
      f'No example remains of {len(rows)} rows for train.target={target!r}; dropped: '
      f"{dict(dropped)}. 'truncated' means cut at sampling.*.max_tokens (raise it, or set "
      f"train.drop_truncated=False), 'too_long' means more than train.max_length={max_length} "
      f"tokens, and 'filtered_' means a defect in train.filters={tuple(filters)}."
    )
  if len(helpful):
    chosen = np.sort(np.random.default_rng([seed, 1]).permutation(len(helpful))[:num_helpful])
    dropped['helpful_beyond_share'] += len(helpful) - num_helpful
    helpful = helpful[chosen]
  counts = {
    'rows': len(rows),
    'kept': len(kept) + len(helpful),
    'helpful': len(helpful),
    'dropped': {reason: n for reason, n in sorted(dropped.items()) if n},
  }
  order = np.concatenate([kept, helpful])
  return ExampleSet(UnitTable(parts, 'sequence').take(order), counts)


def hold_out(
  examples: Sequence[Any],
  share: float,
  seed: int,
  groups: Mapping[str, int] | None = None,
  section: str = 'train',
) -> tuple[Sequence[Any], Sequence[Any]]:
  """Split examples, or units, into those to train on and those to hold out.

  All examples of one row are on the same side, and so are all rows of one group.

  Args:
    examples: what to split: a sequence of what has an `id`, or a `UnitTable`.
    share: share of the rows to hold out, at least one row; 0 holds out none.
    seed: chooses the rows.
    groups: group of each row by its id, such as near-duplicates; by default each is its own.
    section: section of the config that has the share, for messages.

  Raises:
    UserError: if nothing remains to train on.
  """
  if not share:
    return choose_items(examples, range(len(examples))), choose_items(examples, ())
  ids = item_ids(examples)
  rows = list(dict.fromkeys(ids))
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
    choose_items(examples, [i for i, name in enumerate(ids) if name not in chosen]),
    choose_items(examples, [i for i, name in enumerate(ids) if name in chosen]),
  )
