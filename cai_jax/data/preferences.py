"""The implied preferences of D_CAI: the last revision is preferred to the initial response."""

import json
import os
from collections.abc import Iterable
from typing import Any

from cai_jax.runtime.files import replacing


def write_preferences(path: str | os.PathLike, rows: Iterable[dict[str, Any]]) -> dict[str, int]:
  """Write the pairs (last revision ≻ y_init) in TRL's conversational format.

  Each line of the file is a JSON object with `id` and with `prompt`, `chosen` and `rejected`, which
  are lists of messages. Pairs with equal texts or an empty text carry no preference and are left
  out.

  Args:
    path: the .jsonl file to write.
    rows: rows of D_CAI, see `d_cai.read_rows`.

  Returns:
    The number of pairs 'written', and of rows left out because their texts are 'identical', one
    text is 'empty', or the response was 'not_revised'.
  """
  counts = {'written': 0, 'identical': 0, 'empty': 0, 'not_revised': 0}
  with replacing(path) as temporary, open(temporary, 'w', encoding='utf-8') as file:
    for row in rows:
      reason = _reason_to_skip(row)
      counts[reason or 'written'] += 1
      if not reason:
        file.write(json.dumps(_pair(row), ensure_ascii=False) + '\n')
  return counts


def _texts(row: dict[str, Any]) -> tuple[str, str]:
  """Return the last revision and the initial response of a revised row."""
  return row['rounds'][-1]['revision']['text'], row['initial']['text']


def _reason_to_skip(row: dict[str, Any]) -> str:
  """Return why a row implies no preference, or '' if it implies one."""
  if not row['rounds']:
    return 'not_revised'
  chosen, rejected = _texts(row)
  if not chosen or not rejected:
    return 'empty'
  return 'identical' if chosen == rejected else ''


def _pair(row: dict[str, Any]) -> dict[str, Any]:
  """Return the preference pair of a row."""
  chosen, rejected = _texts(row)
  return {
    'id': row['id'],
    'prompt': row['prompt'],
    'chosen': [{'role': 'assistant', 'content': chosen}],
    'rejected': [{'role': 'assistant', 'content': rejected}],
  }
