"""The preferences that D_CAI implies: a later response is better than an earlier one."""

import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cai_jax.data import d_cai
from cai_jax.data.preferences.comparisons import Comparison
from cai_jax.data.preferences.forms import FORMS, Item, attempt, reason_to_leave_out
from cai_jax.data.preferences.trl import reply
from cai_jax.runtime.files import replacing

# Number of responses of a chain → (better, worse) pairs. Response 0 is the initial one, response k
# the revision of round k.
PAIRS: dict[str, Callable[[int], list[tuple[int, int]]]] = {
  'last_over_initial': lambda n: [(n - 1, 0)],
  'each_over_previous': lambda n: [(k, k - 1) for k in range(1, n)],
  'every_pair': lambda n: [(j, i) for i, j in itertools.combinations(range(n), 2)],
}


@FORMS.register('d_cai')
def read_d_cai(path: str, pairs: str) -> Iterator[Item]:
  """Yield the implied preferences of a D_CAI.

  Rows without a revision are 'not_revised'. A round that kept the response before it gives an
  'identical' pair.

  Args:
    path: the folder d_cai/ of a run.
    pairs: which pairs of a chain, a key of `PAIRS`.
  """
  d_cai.check_schema(path)
  rows = d_cai.read_rows(path)
  for number in range(len(rows)):
    row = rows[number]
    place = f'{path}, row {number} ({row["id"]})'
    if not row['rounds']:
      yield place, 'not_revised'
      continue
    for better, worse in PAIRS[pairs](1 + len(row['rounds'])):
      # The pair that preferences.jsonl has keeps the id that it has there.
      name = row['id'] if pairs == 'last_over_initial' else f'{row["id"]}/{better}-{worse}'
      make = functools.partial(_make, better=better, worse=worse, name=name)
      yield place, attempt(make, row)


def _make(row: Mapping[str, Any], better: int, worse: int, name: str) -> Comparison | str:
  """Return the comparison of two responses of a row, or the reason to leave it out."""
  turns = [row['initial'], *(step['revision'] for step in row['rounds'])]
  chosen, rejected = turns[better]['text'].strip(), turns[worse]['text'].strip()
  reason = reason_to_leave_out(chosen, rejected, sampled=True)
  return reason or Comparison(
    name,
    tuple(row['prompt']),
    chosen,
    rejected,
    source='implied',
    truncated=(_is_cut(turns[better]), _is_cut(turns[worse])),
  )


def _is_cut(turn: Mapping[str, Any]) -> bool:
  return turn['finish_reason'] == 'length'


def write_preferences(path: str | os.PathLike, rows: Sequence[dict[str, Any]]) -> dict[str, int]:
  """Write the pairs (last revision ≻ y_init) in TRL's conversational format.

  Each line of the file is a JSON object with `id` and with `prompt`, `chosen` and `rejected`, which
  are lists of messages. If a response of one of the pairs was cut off, each line also says so under
  `truncated`. Pairs with equal texts or an empty text carry no preference and are left out.

  Args:
    path: the .jsonl file to write.
    rows: rows of D_CAI, see `d_cai.read_rows`. They are read twice.

  Returns:
    The number of pairs 'written', and of rows left out because their texts are 'identical', one
    text is 'empty', or the response was 'not_revised'.
  """
  counts = {'written': 0, 'identical': 0, 'empty': 0, 'not_revised': 0}
  has_cut = any(any(line['truncated']) for line in map(_line, rows) if not isinstance(line, str))
  with replacing(path) as temporary, open(temporary, 'w', encoding='utf-8') as file:
    for line in map(_line, rows):
      counts[line if isinstance(line, str) else 'written'] += 1
      if not isinstance(line, str):
        if not has_cut:
          del line['truncated']
        file.write(json.dumps(line, ensure_ascii=False) + '\n')
  return counts


def _line(row: Mapping[str, Any]) -> dict[str, Any] | str:
  """Return the line of a row, or the reason for which it has none.

  A model may write any character, so the texts are not checked as those of a file are.
  """
  if not row['rounds']:
    return 'not_revised'
  turns = row['rounds'][-1]['revision'], row['initial']
  chosen, rejected = (turn['text'].strip() for turn in turns)
  return reason_to_leave_out(chosen, rejected) or {
    'id': row['id'],
    'prompt': list(row['prompt']),
    'chosen': reply(chosen),
    'rejected': reply(rejected),
    'truncated': [_is_cut(turn) for turn in turns],
  }
