"""The implied preferences: last revision over initial response."""

import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any


def write_preferences(path: str | os.PathLike, rows: Iterable[dict[str, Any]]) -> dict[str, int]:
  """Writes (last revision ≻ y_init) in TRL's conversational form; counts what became of each row.

  One JSON object a line with `prompt`, `chosen` and `rejected`, each a list of messages, and `id`.
  Pairs of equal texts say nothing and are left out, as are those with an empty one.
  """
  counts = {'written': 0, 'identical': 0, 'empty': 0, 'not_revised': 0}
  temporary = pathlib.Path(f'{path}.tmp')
  with open(temporary, 'w', encoding='utf-8') as file:
    for row in rows:
      pair = _preference(row)
      if isinstance(pair, str):
        counts[pair] += 1
        continue
      counts['written'] += 1
      file.write(json.dumps(pair, ensure_ascii=False) + '\n')
  os.replace(temporary, path)
  return counts


def _preference(row: dict[str, Any]) -> dict[str, Any] | str:
  """The preference pair of a row, or why there is none."""
  if not row['rounds']:
    return 'not_revised'
  chosen, rejected = row['rounds'][-1]['revision']['text'], row['initial']['text']
  if not chosen or not rejected:
    return 'empty'
  if chosen == rejected:
    return 'identical'
  return {
    'id': row['id'],
    'prompt': row['prompt'],
    'chosen': [{'role': 'assistant', 'content': chosen}],
    'rejected': [{'role': 'assistant', 'content': rejected}],
  }
