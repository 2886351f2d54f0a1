"""The preference formats of TRL, read and written.

  {"prompt": [..], "chosen": [..], "rejected": [..]}     conversational: lists of messages
  {"prompt": "..", "chosen": "..", "rejected": ".."}     plain texts
  {"chosen": [.., reply], "rejected": [.., reply]}       with an implicit prompt
  {"prompt": .., "completion": .., "label": true}        unpaired: one judged response

docs/source/dataset_formats.md of huggingface/trl (seen at f2cd577) defines them. Optional fields
are `id`, `probability` (that `chosen` is better), `score_chosen` and `score_rejected` as in
UltraFeedback (HuggingFaceH4/ultrafeedback_binarized), `margin` as TRL's reward trainer reads it,
`truncated` and `source`.

A plain prompt is the text of a user, or a transcript, as in files of prompts. Two plain texts
without a prompt are read if they are transcripts; otherwise nothing says where the prompt ends.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from cai_jax.data.dialogues import Messages, parse_messages
from cai_jax.data.preferences.comparisons import Comparison, JudgedResponse, is_number
from cai_jax.data.preferences.forms import (
  FORMS,
  Item,
  attempt,
  last_reply,
  read_rows,
  reason_to_leave_out,
  row_id,
)
from cai_jax.runtime.errors import UserError, show
from cai_jax.runtime.files import replacing

ROW = 'A row needs {"prompt": .., "chosen": .., "rejected": ..} (docs/preferences.md).'
JUDGED_ROW = 'A row needs {"prompt": .., "completion": .., "label": true or false}.'


@FORMS.register('trl')
def read_trl(path: str, pairs: str) -> Iterator[Item]:
  """Yield the comparisons of a file in one of TRL's preference formats.

  Args:
    path: the file.
    pairs: not used.
  """
  for place, row in read_rows(path):
    yield place, attempt(_parse_comparison, row)


def parse_judged(row: Mapping[str, Any]) -> JudgedResponse | str:
  """Return the judged response of a row in TRL's unpaired format, or 'empty'.

  Args:
    row: the row.

  Raises:
    UserError: if a field is missing or has another form.
  """
  _require(row, ('prompt', 'completion', 'label'), JUDGED_ROW)
  prompt, text = _explicit(row, 'completion')
  if not text:
    return 'empty'
  name = row_id(row, [prompt, text, row['label']])
  truncated = row.get('truncated') or False
  if not isinstance(row['label'], bool) or not isinstance(truncated, bool):
    raise UserError(
      f'label and truncated must be true or false, but got {show(row["label"])} and '
      f'{show(truncated)}.'
    )
  return JudgedResponse(name, tuple(prompt), text, row['label'], _source(row), truncated)


def write_comparisons(path: str | os.PathLike, comparisons: Iterable[Comparison]) -> int:
  """Write comparisons in TRL's conversational format, one row at a time; return their number.

  All rows have the same fields, as `datasets` needs them, if all or none have scores or a margin.

  Args:
    path: the .jsonl file to write; it appears when it is complete.
    comparisons: the comparisons.
  """
  return _write(path, map(comparison_row, comparisons))


def write_judged(path: str | os.PathLike, responses: Iterable[JudgedResponse]) -> int:
  """Write judged responses in TRL's unpaired conversational format; return their number.

  Args:
    path: the .jsonl file to write; it appears when it is complete.
    responses: the judged responses.
  """
  return _write(path, map(_judged_row, responses))


def _parse_comparison(row: Mapping[str, Any]) -> Comparison | str:
  _require(row, ('chosen', 'rejected'), ROW)
  side = _implicit if row.get('prompt') is None else _explicit
  (prompt, chosen), (other, rejected) = side(row, 'chosen'), side(row, 'rejected')
  if prompt != other:
    raise UserError(
      'The prompts of chosen and rejected differ. Both sides must answer the same dialogue; they '
      f'end with {show(prompt[-1:])} and {show(other[-1:])}.'
    )
  if reason := reason_to_leave_out(chosen, rejected):
    return reason
  probability = row.get('probability')
  return Comparison(
    row_id(row, [prompt, chosen, rejected]),
    tuple(prompt),
    chosen,
    rejected,
    1.0 if probability is None else probability,
    _number(row, 'margin'),
    _source(row),
    _scores(row),
    _truncated(row),
  )


def _require(row: Mapping[str, Any], names: Iterable[str], form: str) -> None:
  if missing := [name for name in names if row.get(name) is None]:
    raise UserError(f'The row lacks {", ".join(missing)}. It has {show(list(row), 200)}. {form}')


def _explicit(row: Mapping[str, Any], name: str) -> tuple[Messages, str]:
  """Return the prompt and the reply of a side of a row that has a prompt.

  The side is a text, or messages that end with the reply. If they begin with the prompt, as in
  UltraFeedback, it must be the same one.
  """
  given, value = row['prompt'], row[name]
  if isinstance(value, str):
    return _prompt(given), value.strip()
  before, text = last_reply(name, parse_messages(value))
  if not before:
    return _prompt(given), text
  turns = [message for message in before if message['role'] != 'system']
  if len(turns) == 1 and turns[0]['content'] == given:
    return before, text
  prompt = _prompt(given)
  if prompt not in (before, turns):
    raise UserError(
      f'{name} begins with another prompt than the field prompt. Its last turn before the reply is '
      f'{show(before[-1:])}.'
    )
  return before, text


def _implicit(row: Mapping[str, Any], name: str) -> tuple[Messages, str]:
  """Return the prompt and the reply of a side of a row without a prompt."""
  messages = parse_messages(row[name])
  if isinstance(row[name], str) and len(messages) == 1:
    raise UserError(
      f'The row has no prompt, and {name} is a text without "\\n\\nHuman:" and "\\n\\nAssistant:", '
      f'so nothing says where the prompt ends. {ROW}'
    )
  return last_reply(name, messages)


def _prompt(value: Any) -> Messages:
  """Return the messages of the field `prompt`, without an empty last turn of a transcript."""
  messages = parse_messages(value)
  is_label = messages[-1:] == [{'role': 'assistant', 'content': ''}]
  return messages[:-1] if is_label else messages


def _scores(row: Mapping[str, Any]) -> tuple[float, float] | None:
  scores = _number(row, 'score_chosen'), _number(row, 'score_rejected')
  if (scores[0] is None) != (scores[1] is None):
    raise UserError('score_chosen and score_rejected must both be given, or none of them.')
  return None if scores[0] is None or scores[1] is None else (scores[0], scores[1])


def _number(row: Mapping[str, Any], name: str) -> float | None:
  value = row.get(name)
  if value is not None and not is_number(value):
    raise UserError(f'{name} must be a finite number, but got {show(value)}.')
  return value


def _source(row: Mapping[str, Any]) -> str:
  source = row.get('source')
  return source if isinstance(source, str) else 'trl'


def _truncated(row: Mapping[str, Any]) -> tuple[bool, bool]:
  value = row.get('truncated')
  if value is None:
    return False, False
  if not isinstance(value, list) or [type(entry) for entry in value] != [bool, bool]:
    raise UserError(
      'truncated must be a list that says for chosen and for rejected whether it was cut off, such '
      f'as [false, true], but got {show(value)}.'
    )
  return value[0], value[1]


def comparison_row(pair: Comparison) -> dict[str, Any]:
  """Return the row of a comparison in TRL's conversational format.

  Args:
    pair: the comparison.
  """
  row = {
    'id': pair.id,
    'prompt': list(pair.prompt),
    'chosen': reply(pair.chosen),
    'rejected': reply(pair.rejected),
    'probability': pair.probability,
  }
  if pair.scores is not None:
    row |= {'score_chosen': pair.scores[0], 'score_rejected': pair.scores[1]}
  if pair.margin is not None:
    row['margin'] = pair.margin
  return row | {'truncated': list(pair.truncated), 'source': pair.source}


def _judged_row(judged: JudgedResponse) -> dict[str, Any]:
  return {
    'id': judged.id,
    'prompt': list(judged.prompt),
    'completion': reply(judged.response),
    'label': judged.desirable,
    'truncated': judged.truncated,
    'source': judged.source,
  }


def reply(text: str) -> Messages:
  """Return the messages of a response."""
  return [{'role': 'assistant', 'content': text}]


def _write(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> int:
  count = 0
  with replacing(path) as temporary, open(temporary, 'w', encoding='utf-8') as file:
    for row in rows:
      file.write(json.dumps(row, ensure_ascii=False) + '\n')
      count += 1
  return count
