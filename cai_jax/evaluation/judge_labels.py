"""Labelled pairs, on which a judge's accuracy is measured.

A file has one JSON object per line, in one of these forms:

- `{"prompt": ..., "chosen": ..., "rejected": ...}`: the prompt is a text or a list of messages (the
  field may also be called "messages"), and the others are responses, each a text or a list with one
  message;
- `{"chosen": ..., "rejected": ...}`: two whole transcripts that differ in their last reply only, as
  in HH-RLHF (Bai et al. 2022a);
- a line of the published HHH questions (Askell et al. 2021), which has the transcripts
  `text_correct` and `text_incorrect`. The principle is that of its question.

A row may also have a `principle`, the instruction to the judge. In place of a file, a set of pairs
can have a name, see `judge.LABELLED`.
"""

import collections
import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cai_jax.data.dialogues import check_prompt, parse_messages
from cai_jax.dialogue import Message
from cai_jax.runtime.errors import UserError, show
from cai_jax.runtime.text_files import check_characters, parse_json, read_lines
from cai_jax.scoring.judge import LABELLED, Match

PLAYERS = ('chosen', 'rejected')
FORM = (
  'A line has the form {"prompt": "...", "chosen": "...", "rejected": "..."}, or has the whole '
  'dialogues as "chosen" and "rejected".'
)

_PUBLISHED_PRINCIPLE = re.compile(r'\n([^\n]+ Options:)\n \(A\) ')


@dataclasses.dataclass(frozen=True)
class LabelledPairs:
  """Pairs of a better and a worse response.

  Attributes:
    matches: the pairs, with the better response first.
    left_out: numbers of rows that are no pair to judge, by the reason.
  """

  matches: list[Match]
  left_out: dict[str, int]


def read_labelled(source: str | os.PathLike, principle: str, limit: int = -1) -> LabelledPairs:
  """Read labelled pairs.

  Args:
    source: a file, possibly compressed with gzip, or a name of `LABELLED`.
    principle: the principle of the rows that have none of their own.
    limit: number of pairs to read; -1 reads all.

  Raises:
    UserError: if the file cannot be read, has a line of another form, or has no pair to judge.
  """
  if str(source) in LABELLED:
    named = LABELLED[str(source)](limit)
    rows: Iterable = ((f'{source}, pair {i}', row) for i, row in enumerate(named))
  else:
    rows = _read_rows(source)
  matches: list[Match] = []
  left_out: collections.Counter[str] = collections.Counter()
  for place, row in rows:
    if len(matches) == limit:
      break
    try:
      messages, responses = _parse_row(row)
      text = row.get('principle') or _published_principle(row) or principle
      if not isinstance(text, str) or not text.strip():
        raise UserError(f'The principle is {show(text)}, but it must be text.')
    except UserError as error:
      raise UserError(f'{place}: {error} {FORM}') from error
    if reason := _reason_to_leave_out(messages, responses):
      left_out[reason] += 1
      continue
    matches.append(Match(place, messages[0], text, PLAYERS, responses))
  if not matches:
    reasons = f' Rows were left out: {dict(left_out)}.' if left_out else ''
    raise UserError(f'{source} has no pair to judge.{reasons} {FORM}')
  return LabelledPairs(matches, dict(left_out))


def _read_rows(path: str | os.PathLike) -> Iterable[tuple[str, dict[str, Any]]]:
  """Yield the place and the object of each line."""
  for number, line in read_lines(path):
    if not line.strip():
      continue
    place = f'{path}:{number}'
    try:
      row = parse_json(line)
    except ValueError as error:
      raise UserError(f'{place} is not JSON ({error}). {FORM}') from error
    if not isinstance(row, dict):
      raise UserError(f'{place} is not an object. {FORM}')
    check_characters(place, line)
    yield place, row


def _parse_row(
  row: Mapping[str, Any],
) -> tuple[tuple[Sequence[Message], Sequence[Message]], tuple[str, str]]:
  """Return the messages before each response, and the two responses."""
  names = ('text_correct', 'text_incorrect') if 'text_correct' in row else PLAYERS
  if missing := [name for name in names if row.get(name) is None]:
    raise UserError(f'The row has no {missing[0]!r}. It has {show(list(row), 200)}.')
  prompt = next((row[n] for n in ('prompt', 'messages') if row.get(n) is not None), None)
  if names[0] == 'text_correct' or prompt is None:
    dialogues = [parse_messages(row[name], is_transcript=True) for name in names]
  else:
    messages = parse_messages(prompt)
    dialogues = [_append_response(messages, row[name], name) for name in names]
  for name, dialogue in zip(names, dialogues, strict=True):
    if len(dialogue) < 2 or dialogue[-1]['role'] != 'assistant':
      raise UserError(f'{name!r} does not end with a reply of the assistant.')
    check_prompt(dialogue[:-1])
  first, second = dialogues
  return (first[:-1], second[:-1]), (first[-1]['content'], second[-1]['content'])


def _append_response(messages: list[Message], response: Any, name: str) -> list[Message]:
  """Return a dialogue with a response, which is a text, a message, or a dialogue that has it."""
  if isinstance(response, str):
    return [*messages, {'role': 'assistant', 'content': response}]
  parsed = parse_messages(response)
  if len(parsed) == 1:
    return [*messages, *parsed]
  if parsed[:-1] != messages:
    raise UserError(f'{name!r} is a dialogue that does not begin with the prompt of the row.')
  return parsed


def _published_principle(row: Mapping[str, Any]) -> str:
  """Return the principle of a published HHH question, or ''."""
  prompt = row.get('prompt')
  found = _PUBLISHED_PRINCIPLE.search(prompt) if isinstance(prompt, str) else None
  return found[1] if found else ''


def _reason_to_leave_out(
  messages: tuple[Sequence[Message], Sequence[Message]], responses: tuple[str, str]
) -> str:
  """Return why a judge cannot compare a pair, or ''."""
  if messages[0] != messages[1]:
    return 'different prompts'
  if not all(text.strip() for text in responses):
    return 'blank response'
  return 'equal responses' if responses[0].strip() == responses[1].strip() else ''
