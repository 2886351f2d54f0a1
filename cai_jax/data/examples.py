"""Rows of D_CAI as training examples: token ids with a loss mask."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cai_jax.data import quality
from cai_jax.runtime.errors import UserError

HELPFUL = 'helpful'  # `kind` of the rows whose initial answer can be mixed in


class Example(NamedTuple):
  """One sequence: tokens i32[T], loss_mask bool[T], true on the tokens to learn, and its row."""

  tokens: np.ndarray
  loss_mask: np.ndarray
  id: str = ''  # of the row of D_CAI


@dataclasses.dataclass(frozen=True)
class Examples:
  """Examples, with counts: rows, kept, helpful (of those kept), dropped by reason."""

  items: tuple[Example, ...]
  counts: dict[str, Any]


def build_examples(
  rows: Sequence[Mapping[str, Any]],
  dialogue,
  *,
  target: str = 'last',
  helpfulness_share: float = 0.0,
  max_length: int = 1024,
  drop_truncated: bool = True,
  filters: Sequence[str] = (),
  known: quality.References | None = None,
  seed: int = 0,
) -> Examples:
  """The examples of D_CAI, in the order of its rows; helpfulness examples stand at the end.

  Args:
    rows: each has `id`, `kind`, `prompt` (messages), `initial` {text, finish_reason}, `rounds` of
      {revision: {text, finish_reason}}.
    dialogue: `cai_jax.dialogue.Dialogue`.
    target: 'last' revision, 'all' revisions, or 'initial' answer of each row not of kind 'helpful'.
    helpfulness_share: share of all examples that are the initial answer of a row of kind 'helpful';
      which rows, the seed decides. Rows of this kind are used for nothing else.
    max_length: tokens; a longer example is dropped.
    drop_truncated: drop a text that ended by the length limit; else it is learnt as if whole.
    filters: names of `quality.FLAGS`; a text with any of them is dropped as 'filtered_' + the first
      of those it has, in the order given. The rows stay as they are.
    known: the constitution's `quality.build_references`, for the filters that need them.

  Raises:
    ValueError: if no example is left, or too few for the helpfulness share; if a filter needs
      `known`.
  """
  needing = [name for name in filters if name in quality.NEEDS_REFERENCES]
  if needing and known is None:
    raise UserError(
      f'train.filters: {", ".join(needing)} is told by the principles and demonstrations: give '
      "`known`, the constitution's quality.build_references."
    )
  dropped = collections.Counter()
  kept, helpful = [], []
  for i in range(len(rows)):
    row = rows[i]
    is_helpful = row['kind'] == HELPFUL
    if is_helpful and not helpfulness_share:
      dropped['helpful_not_asked_for'] += 1
      continue
    if is_helpful or target == 'initial':
      rounds = [-1]  # y_init
    else:
      rounds = list(range(len(row['rounds'])))
      rounds = rounds[-1:] if target == 'last' else rounds
      if not rounds:
        dropped['no_revision'] += 1
    for at in rounds:
      reply = row['initial'] if at < 0 else row['rounds'][at]['revision']
      example = _filtered(row, at, filters, known) or _example(
        row, reply, dialogue, max_length, drop_truncated
      )
      if isinstance(example, str):
        dropped[example] += 1
      else:
        (helpful if is_helpful else kept).append(example)
  wanted = round(helpfulness_share * len(kept) / (1 - helpfulness_share))
  if wanted > len(helpful):
    raise UserError(
      f'train.helpfulness_share={helpfulness_share} beside {len(kept)} other examples needs '
      f'{wanted} helpfulness examples, and the data set has {len(helpful)}: generate more helpful '
      'prompts, or ask for a smaller share.'
    )
  if not kept:
    raise UserError(
      f'no example is left of {len(rows)} rows for train.target={target!r}; dropped: '
      f"{dict(dropped)}. 'truncated' were cut at sampling.*.max_tokens: raise it, or set "
      f"train.drop_truncated=False; 'too_long' exceed train.max_length={max_length}; 'filtered_' "
      f'have a defect of train.filters={tuple(filters)}.'
    )
  if helpful:
    chosen = np.sort(np.random.default_rng([seed, 1]).permutation(len(helpful))[:wanted])
    dropped['helpful_beyond_share'] += len(helpful) - wanted
    helpful = [helpful[i] for i in chosen]
  counts = {
    'rows': len(rows),
    'kept': len(kept) + len(helpful),
    'helpful': len(helpful),
    'dropped': {reason: n for reason, n in sorted(dropped.items()) if n},
  }
  return Examples(tuple(kept + helpful), counts)


def hold_out(
  items: Sequence[Example], share: float, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
  """(examples to train on, examples held out): `share` of the rows, which the seed chooses.

  All examples of a row are on the same side.

  Raises:
    ValueError: if that leaves none on a side.
  """
  if not share:
    return tuple(items), ()
  rows = list(dict.fromkeys(item.id for item in items))
  count = max(round(share * len(rows)), 1)
  if count >= len(rows):
    raise UserError(
      f'train.eval_share={share} of {len(rows)} rows leaves none to train on: lower it.'
    )
  chosen = {rows[i] for i in np.random.default_rng([seed, 2]).permutation(len(rows))[:count]}
  return (
    tuple(item for item in items if item.id not in chosen),
    tuple(item for item in items if item.id in chosen),
  )


def _filtered(row, at: int, filters: Sequence[str], known) -> str | None:
  """The reason to filter out the revision of a round (-1: y_init), if there is one."""
  found = quality.find_row_flags(row, at, known) if filters else ()
  return next((f'filtered_{name}' for name in filters if name in found), None)


def _example(row, reply, dialogue, max_length, drop_truncated) -> Example | str:
  """The example of a reply, or the reason to drop it."""
  if not reply['text'].strip():
    return 'empty'
  if drop_truncated and reply['finish_reason'] == 'length':
    return 'truncated'
  messages = [{'role': m['role'], 'content': m['content']} for m in row['prompt']]
  tokens, mask = dialogue.example([*messages, {'role': 'assistant', 'content': reply['text']}])
  if len(tokens) > max_length:
    return 'too_long'
  return Example(np.asarray(tokens, np.int32), np.asarray(mask, bool), row['id'])
