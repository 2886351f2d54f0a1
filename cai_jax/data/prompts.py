"""Prompts: dialogues that end with the user's turn, made from the rows of any source.

A row contains its dialogue in one of these fields (the first present is used):

  messages  [{"role": ..., "content": ...}, ...], ending with the user's turn
  prompt    the user's text, or such a list (TRL's conversational format)
  chosen    a dialogue with its answer (HH-RLHF); the prompt is everything before the last answer

Text that begins with the label "\\n\\nHuman:" is parsed as a plain dialogue, as in HH-RLHF; a final
"\\n\\nAssistant:" is a generation prompt and not a turn. Two further fields are optional: `id` (by
default a hash of the dialogue) and `metadata` (an object of texts). Other fields are read only if
a setting names them.

prompt_sources.py reads the rows; new sources and file formats are added there.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from cai_jax.data.prompt_sources import ROW_FORM, PromptSource, read_rows
from cai_jax.dialogue.plain import LABELS, split_plain
from cai_jax.runtime.errors import UserError

ROLES = ('system', 'user', 'assistant')


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A dialogue x that awaits the assistant's response.

  Attributes:
    id: unique within a run; random seeds are derived from it.
    messages: {'role', 'content'} dicts: an optional system message, then user and assistant
      alternating, with the user first and last. Every content is non-blank text.
    metadata: texts stored with the prompt, such as its category.

  Raises:
    UserError: if an attribute does not have this form.
  """

  id: str
  messages: tuple[dict[str, str], ...]
  metadata: dict[str, str] = dataclasses.field(default_factory=dict)

  def __post_init__(self) -> None:
    if not isinstance(self.id, str) or not self.id or not self.id.isprintable():
      raise UserError(f'A prompt id must be printable text and not empty, but got {self.id!r}.')
    object.__setattr__(self, 'messages', tuple(self.messages))
    _check_messages(self.messages)
    not_text = {k: v for k, v in self.metadata.items() if not isinstance(v, str)}
    if not_text:
      raise UserError(f'Prompt metadata must be texts, but got {not_text!r}.')


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
  rows = [
    _parse_row(place, row, source.field, source.metadata_fields)
    for place, row in read_rows(source, seed)
  ]
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
  seen = {_normalize(prompt): prompt.id for prompt in training}
  shared = [(seen[form], p) for p in evaluation if (form := _normalize(p)) in seen]
  if shared:
    examples = '; '.join(
      f'{names[0]} {first!r} is {names[1]} {prompt.id!r}: {prompt.messages[-1]["content"]!r:.80}'
      for first, prompt in shared[:3]
    )
    raise UserError(
      f'{len(shared)} of the {names[1]} prompts also occur in the {names[0]} prompts: {examples}. '
      'Remove them from one of the two sets.'
    )


def parse_dialogue(text: str) -> list[dict[str, str]]:
  """Parse a dialogue in the plain form of HH-RLHF.

  Only "\\n\\nHuman:" and "\\n\\nAssistant:" are labels. Some published rows have the same label
  twice in a row; such turns are joined with an empty line.

  Returns:
    Messages with 'role' and 'content'.

  Raises:
    UserError: if the text does not begin with a label.
  """
  turns = split_plain(text, ('user', 'assistant'))
  return [
    {'role': role, 'content': '\n\n'.join(turn['content'] for turn in group)}
    for role, group in itertools.groupby(turns, key=lambda turn: turn['role'])
  ]


class _Row(NamedTuple):
  """A parsed row: its place in the source, its prompt, and whether the row contains an id."""

  place: str
  prompt: Prompt
  has_id: bool


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
  """Raise UserError unless the messages are a dialogue that awaits the assistant."""
  for i, message in enumerate(messages):
    if not isinstance(message, dict) or set(message) != {'role', 'content'}:
      raise UserError(
        f"Message {i} must be an object with the keys 'role' and 'content', but got {message!r}."
      )
    role, content = message['role'], message['content']
    if role not in ROLES:
      raise UserError(f'Message {i} has the role {role!r}. The allowed roles are {ROLES}.')
    if not isinstance(content, str) or not content.strip():
      raise UserError(
        f'The content of message {i} ({role}) must be non-blank text, but got {content!r}.'
      )
    if any('\ud800' <= character <= '\udfff' for character in content):
      raise UserError(f'The content of message {i} ({role}) contains an unpaired surrogate.')
  roles = [message['role'] for message in messages]
  turns = roles[1:] if roles[:1] == ['system'] else roles
  if len(turns) % 2 == 0 or turns != (['user', 'assistant'] * len(turns))[: len(turns)]:
    raise UserError(
      'A prompt must be an optional system message, then alternating user and assistant messages, '
      f'with the user first and last, but got the roles {roles}. Put a dialogue with its answer '
      "into the field 'chosen'."
    )


def _parse_row(place: str, row: Any, field: str, metadata_fields: Sequence[str]) -> _Row:
  try:
    if not isinstance(row, dict):
      raise UserError(f'A row must be an object, but got a {type(row).__name__}.')
    candidates = [field] if field else ['messages', 'prompt', 'chosen']
    present = next((name for name in candidates if name in row), None)
    if present is None:
      raise UserError(f'The row has none of the fields {candidates}. It has {list(row)}.')
    messages = _parse_messages(row[present], has_answer=present in ('chosen', 'rejected'))
    prompt_id = _parse_id(row['id']) if 'id' in row else _hash(messages)
    prompt = Prompt(prompt_id, tuple(messages), _parse_metadata(row, metadata_fields))
    return _Row(place, prompt, 'id' in row)
  except UserError as error:
    raise UserError(f'{place}: {error} {ROW_FORM}') from error


def _parse_id(value: Any) -> str:
  if isinstance(value, bool) or not isinstance(value, str | int) or value == '':
    raise UserError(f'An id must be an integer or non-empty text, but got {value!r}.')
  return str(value)


def _parse_metadata(row: Mapping[str, Any], fields: Sequence[str]) -> dict[str, str]:
  """Return the row's metadata together with the named fields, as text."""
  metadata = row.get('metadata', {})
  if isinstance(metadata, str):  # flat tables such as D_CAI store it as JSON text
    try:
      metadata = json.loads(metadata)
    except (ValueError, RecursionError) as error:
      raise UserError(f'metadata must be an object, or an object as JSON text: {error}.') from error
  if not isinstance(metadata, dict):
    raise UserError(f'metadata must be an object of texts, but got {metadata!r:.80}.')
  missing = [name for name in fields if name not in row]
  if missing:
    raise UserError(f'The row lacks the metadata fields {missing}. It has {list(row)}.')
  return metadata | {name: str(row[name]) for name in fields}


def _parse_messages(value: Any, has_answer: bool) -> list[dict[str, str]]:
  """Return the messages of a dialogue given as text or as a list, without its last answer."""
  is_text = isinstance(value, str)
  if is_text and (has_answer or value.startswith(LABELS['user'])):
    messages = parse_dialogue(value)
  elif is_text:
    messages = [{'role': 'user', 'content': value}]
  elif isinstance(value, list):
    messages = value
  else:
    raise UserError(f'A dialogue must be text or a list of messages, but got {value!r:.80}.')
  if not has_answer:
    ends_with_label = is_text and messages[-1] == {'role': 'assistant', 'content': ''}
    return messages[:-1] if ends_with_label else messages
  last = messages[-1] if messages else None
  if not isinstance(last, dict) or last.get('role') != 'assistant':
    raise UserError(
      f'A dialogue with its answer must end with the assistant, but got {last!r:.80}.'
    )
  return messages[:-1]


def _make_ids_unique(rows: Sequence[_Row]) -> list[Prompt]:
  """Return the prompts. Append a counter to repeated hashes, and reject repeated given ids."""
  places: dict[str, str] = {}
  for row in rows:
    if row.has_id and row.prompt.id in places:
      raise UserError(
        f'{row.place}: the id {row.prompt.id!r} is already used at {places[row.prompt.id]}. '
        'Give each row its own id.'
      )
    if row.has_id:
      places[row.prompt.id] = row.place
  copies: collections.Counter[str] = collections.Counter()
  prompts = []
  for place, prompt, has_id in rows:
    if not has_id:
      digest = prompt.id
      if copies[digest]:
        prompt = dataclasses.replace(prompt, id=f'{digest}-{copies[digest]}')
      copies[digest] += 1
      if prompt.id in places:
        raise UserError(
          f'{place}: the hash of this dialogue equals the id given at {places[prompt.id]}. '
          'Change that id.'
        )
    prompts.append(prompt)
  return prompts


def _normalize(prompt: Prompt) -> str:
  turns = [[m['role'], ' '.join(m['content'].casefold().split())] for m in prompt.messages]
  return json.dumps(turns)


def _hash(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
