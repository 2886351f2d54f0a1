"""Prompts: dialogues that end with the user's turn, made from the rows of any source.

A row contains its dialogue in one of these fields:

  messages  [{"role": ..., "content": ...}, ...], ending with the user's turn; also named
            conversations or conversation, as in ShareGPT
  prompt    the user's text, a transcript, or such a list (TRL's conversational format)
  chosen    a dialogue with its answer (HH-RLHF); the prompt is everything before the last answer

A row may have both messages and a prompt if they are the same. The module dialogues.py describes
the shapes of a dialogue. Two further fields are optional: `id` (by default a hash of the dialogue)
and `metadata` (an object of texts). Beside messages, `system` is the text of a system message.
Other fields are read only if a setting names them.

prompt_files.py reads files and prompt_sources.py other sources; new ones are added there.
"""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from cai_jax.data import prompt_files as prompt_files  # importing it registers the file formats
from cai_jax.data.dialogues import Messages, check_prompt, parse_messages
from cai_jax.data.prompt_sources import (
  DIALOGUE_FIELDS,
  MESSAGE_FIELDS,
  ROW_FORM,
  PromptSource,
  read_rows,
)
from cai_jax.runtime.errors import UserError, show
from cai_jax.runtime.text_files import check_characters, parse_json

MAX_ID = 1000  # characters


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A dialogue x that awaits the assistant's response.

  Attributes:
    id: unique within a run; random seeds are derived from it.
    messages: {'role', 'content'} dicts: an optional system message, then user and assistant
      alternating, with the user first and last. Every content is non-blank text.
    metadata: texts stored with the prompt, such as its category.
    place: the file and row from which the prompt was read, for error messages. It is no part of the
      prompt's identity.

  Raises:
    UserError: if an attribute does not have this form.
  """

  id: str
  messages: tuple[dict[str, str], ...]
  metadata: dict[str, str] = dataclasses.field(default_factory=dict)
  place: str = dataclasses.field(default='', compare=False, repr=False)

  def __post_init__(self) -> None:
    if not isinstance(self.id, str) or not self.id or not self.id.isprintable():
      raise UserError(f'A prompt id must be printable text and not empty, but got {show(self.id)}.')
    if len(self.id) > MAX_ID:
      raise UserError(f'A prompt id must have at most {MAX_ID} characters: {show(self.id)}.')
    object.__setattr__(self, 'messages', tuple(self.messages))
    check_prompt(self.messages)
    for name, value in self.metadata.items():
      if not isinstance(value, str):
        raise UserError(f'Prompt metadata must be texts, but {show(name)} is {show(value)}.')
      check_characters('The metadata', name + value)

  def __str__(self) -> str:
    """Return how error messages name the prompt: its place, or its id if it has no place."""
    return self.place or f'prompt {self.id!r}'


def load_prompts(source: PromptSource, seed: int = 0) -> list[Prompt]:
  """Load the prompts of a source, with unique ids, and check every row.

  Rows without an id get a hash of their dialogue as their id. If dialogues repeat, '-1', '-2', ...
  is appended to the hash.

  Args:
    source: where to load from; an empty source gives no prompts.
    seed: shuffles the prompts if `source.shuffle` is set. Their order depends on the seed and
      their ids only.

  Raises:
    UserError: if the source is missing or empty, a row is not a prompt, or two rows have the same
      id. The message names the line or row.
  """
  if not source.source:
    return []
  rows = [_parse_row(place, row, source) for place, row in read_rows(source, seed)]
  prompts = _make_ids_unique(rows)
  if not prompts:
    raise UserError(
      f'{source.name or source.source}: the source is empty; it needs at least one row. {ROW_FORM}'
    )
  if source.shuffle:
    prompts.sort(key=lambda prompt: (_hash([seed, prompt.id]), prompt.id))
  return prompts if source.limit == -1 else prompts[: source.limit]


def check_disjoint(
  training: Iterable[Prompt],
  evaluation: Iterable[Prompt],
  names: tuple[str, str] = ('training', 'evaluation'),
) -> None:
  """Check that no dialogue occurs in both sets, ignoring case and white space.

  Args:
    training: the first set.
    evaluation: the second set.
    names: names of the two sets, for the error message.
  """
  seen = {_normalize(prompt): prompt for prompt in training}
  shared = [(seen[form], p) for p in evaluation if (form := _normalize(p)) in seen]
  if shared:
    examples = '; '.join(
      f'{names[0]} {_name(first)} is {names[1]} {_name(prompt)}: '
      f'{show(prompt.messages[-1]["content"], 80)}'
      for first, prompt in shared[:3]
    )
    raise UserError(
      f'{len(shared)} of the {names[1]} prompts also occur in the {names[0]} prompts: {examples}. '
      'Remove them from one of the two sets.'
    )


class _Row(NamedTuple):
  """The prompt of a row, and whether the row contains an id."""

  prompt: Prompt
  has_id: bool


def _parse_row(place: str, row: Any, source: PromptSource) -> _Row:
  try:
    if not isinstance(row, dict):
      raise UserError(f'A row must be an object, but got a {type(row).__name__}.')
    messages = _parse_prompt(row, source.field, source.drop_answer)
    check_prompt(messages)
    prompt_id = _parse_id(row['id']) if 'id' in row else _hash(messages)
    metadata = _parse_metadata(row, source.metadata_fields)
    return _Row(Prompt(prompt_id, tuple(messages), metadata, place), 'id' in row)
  except UserError as error:
    raise UserError(f'{place}: {error} {ROW_FORM}') from error
  except RecursionError as error:
    raise UserError(f'{place}: the row is nested too deeply. {ROW_FORM}') from error


def _parse_prompt(row: Mapping[str, Any], field: str, drop_answer: bool) -> Messages:
  """Return the messages of a row's prompt, without the answer where the row has one."""
  candidates = (field,) if field else DIALOGUE_FIELDS
  present = [name for name in candidates if name in row and (field or row[name] is not None)]
  if not present:
    raise UserError(
      f'The row has none of the fields {list(candidates)}. It has {show(list(row), 200)}.'
    )
  if len(present) > 1 and present[-1] == 'chosen':
    present.pop()  # it may be only the answer, as in TRL's format
  has_answer = present[0] in ('chosen', 'rejected')
  messages = parse_messages(row[present[0]], is_transcript=has_answer)
  if present[0] in MESSAGE_FIELDS:
    messages = _add_system(messages, row.get('system'))
  if has_answer and not _ends_with_answer(messages):
    raise UserError(
      f'A dialogue with its answer must end with the assistant, but got {show(messages[-1:])}.'
    )
  for other in present[1:]:
    _check_same(present[0], messages, other, other_messages := parse_messages(row[other]))
    drop_answer |= not _ends_with_answer(other_messages)  # it shows where the prompt ends
  is_label = isinstance(row[present[0]], str) and not str(messages[-1]['content']).strip()
  if _ends_with_answer(messages) and (has_answer or drop_answer or is_label):
    return messages[:-1]
  return messages


def _add_system(messages: Messages, system: Any) -> Messages:
  """Return the messages with the text of the row's field `system` as a message, if it has one."""
  if system is None or (isinstance(system, str) and not system.strip()):
    return messages
  message = {'role': 'system', 'content': system}
  if messages[:1] == [message]:
    return messages
  if any(other['role'] == 'system' for other in messages):
    raise UserError(
      "The row has the field 'system' and another system message. Remove one of the two."
    )
  return [message, *messages]


def _check_same(name: str, messages: Messages, other_name: str, other: Messages) -> None:
  """Check that two fields are the same prompt, apart from the answer and a system message."""
  parts = [
    messages[:-1] if _ends_with_answer(messages) else messages for messages in (messages, other)
  ]
  systems = [part[:1] if part and part[0]['role'] == 'system' else [] for part in parts]
  turns = [part[len(system) :] for part, system in zip(parts, systems, strict=True)]
  if turns[0] != turns[1] or (systems[0] != systems[1] and all(systems)):
    raise UserError(
      f'The fields {name!r} and {other_name!r} are different prompts. Set the setting `field` of '
      'the source to the one to read.'
    )


def _ends_with_answer(messages: Messages) -> bool:
  return bool(messages) and messages[-1]['role'] == 'assistant'


def _parse_id(value: Any) -> str:
  if isinstance(value, bool) or not isinstance(value, str | int) or value == '':
    raise UserError(f'An id must be an integer or non-empty text, but got {show(value)}.')
  if isinstance(value, int) and abs(value) >= 10**MAX_ID:
    raise UserError(f'An id must have at most {MAX_ID} characters, but got {show(value)}.')
  return str(value)


def _parse_metadata(row: Mapping[str, Any], fields: Sequence[str]) -> dict[str, str]:
  """Return the row's metadata together with the named fields, as text."""
  metadata = row.get('metadata')
  if metadata is None:
    metadata = {}
  if isinstance(metadata, str):  # flat tables such as D_CAI store it as JSON text
    try:
      metadata = parse_json(metadata)
    except ValueError as error:
      raise UserError(f'metadata must be an object, or an object as JSON text: {error}.') from error
  if not isinstance(metadata, dict):
    raise UserError(f'metadata must be an object of texts, but got {show(metadata)}.')
  missing = [name for name in fields if name not in row]
  if missing:
    raise UserError(f'The row lacks the metadata fields {missing}. It has {show(list(row), 200)}.')
  present = {name: value for name, value in metadata.items() if value is not None}
  return present | {name: str(row[name]) for name in fields}


def _make_ids_unique(rows: Sequence[_Row]) -> list[Prompt]:
  """Return the prompts. Append a counter to repeated hashes, and reject repeated given ids."""
  places: dict[str, str] = {}
  for row in rows:
    if row.has_id and row.prompt.id in places:
      raise UserError(
        f'{row.prompt}: the id {show(row.prompt.id)} is already used at {places[row.prompt.id]}. '
        'Give each row its own id.'
      )
    if row.has_id:
      places[row.prompt.id] = str(row.prompt)
  copies: collections.Counter[str] = collections.Counter()
  prompts = []
  for prompt, has_id in rows:
    if not has_id:
      digest = prompt.id
      if copies[digest]:
        prompt = dataclasses.replace(prompt, id=f'{digest}-{copies[digest]}')
      copies[digest] += 1
      if prompt.id in places:
        raise UserError(
          f'{prompt}: the hash of this dialogue equals the id given at {places[prompt.id]}. '
          'Change that id.'
        )
    prompts.append(prompt)
  return prompts


def _name(prompt: Prompt) -> str:
  """Return the id of a prompt with its place, if it has one."""
  return f'{prompt.id!r} ({prompt.place})' if prompt.place else repr(prompt.id)


def _normalize(prompt: Prompt) -> str:
  turns = [[m['role'], ' '.join(m['content'].casefold().split())] for m in prompt.messages]
  return json.dumps(turns)


def _hash(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
