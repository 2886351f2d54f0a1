"""How a row of a source becomes a prompt: which fields hold the dialogue, its id and its metadata.

The default form reads the rows that prompts.py describes. A named set has a form of its own, and
the settings of a source replace parts of it.
"""

import ast
import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from cai_jax.data.dialogues import Messages, parse_messages
from cai_jax.data.prompt_sources import DIALOGUE_FIELDS, MESSAGE_FIELDS, PromptSource
from cai_jax.runtime.errors import UserError, show
from cai_jax.runtime.text_files import parse_json

MAX_ID = 1000  # characters
# Between a context and the request about it, as HarmBench's DirectRequest joins them.
_CONTEXT_END = '\n\n---\n\n'


class ParsedRow(NamedTuple):
  """A row, read by its form.

  Attributes:
    messages: the dialogue, without its answer.
    id: the row's id, or None if it has none or the form ignores ids.
    metadata: texts by name.
  """

  messages: Messages
  id: str | None
  metadata: dict[str, str]


@dataclasses.dataclass(frozen=True)
class RowForm:
  """Which fields of a row hold what.

  Attributes:
    fields: fields that can hold the prompt. The first that is not blank counts. () means one of
      messages, conversations, conversation, prompt and chosen.
    plain: a text is the user's message, without a search for the labels of a transcript.
    transcript: a text must be a transcript with the labels "Human:" and "Assistant:".
    drop_answer: leave out the answer of a dialogue that ends with one.
    context: fields of a text that precedes the prompt; the first that is not blank counts.
    system: field of the system message, or ''. Without it, the field `system` beside messages is.
    message_keys: names of the keys that hold a message's role and content. () means role and
      content, or from and value.
    roles: names of roles in the messages → 'system', 'user' or 'assistant'.
    metadata: name of a metadata entry → the fields that can hold it. Rows may lack them.
    required: fields to store in the metadata under their own names. Every row needs them.
    keep_ids: use the field `id` as the prompt's id. Otherwise, ids are hashes of the dialogues.
  """

  fields: tuple[str, ...] = ()
  plain: bool = False
  transcript: bool = False
  drop_answer: bool = False
  context: tuple[str, ...] = ()
  system: str = ''
  message_keys: tuple[str, ...] = ()
  roles: Mapping[str, str] = dataclasses.field(default_factory=dict)
  metadata: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  required: tuple[str, ...] = ()
  keep_ids: bool = True

  def with_settings(self, source: PromptSource) -> 'RowForm':
    """Return the form with what the settings of a source replace or add.

    Args:
      source: the settings.
    """
    return dataclasses.replace(
      self,
      fields=(source.field,) if source.field else self.fields,
      plain=self.plain or source.plain,
      transcript=self.transcript and not source.field,
      drop_answer=self.drop_answer or source.drop_answer,
      system=source.system_field or self.system,
      message_keys=source.message_keys or self.message_keys,
      roles={**self.roles, **dict(pair.rsplit('=', 1) for pair in source.roles)},
      required=self.required + source.metadata_fields,
    )

  def parse(self, row: Any) -> ParsedRow:
    """Return the prompt of a row.

    Args:
      row: the row, an object.

    Raises:
      UserError: if the row lacks a field, or a field has another form.
    """
    if not isinstance(row, dict):
      raise UserError(f'A row must be an object, but got a {type(row).__name__}.')
    messages = self._add_context(self._prompt(row), row)
    row_id = _parse_id(row['id']) if self.keep_ids and 'id' in row else None
    return ParsedRow(messages, row_id, self._metadata(row))

  def _prompt(self, row: Mapping[str, Any]) -> Messages:
    """Return the messages of a row's prompt, without the answer where the row has one."""
    present = self._present(row)
    if len(present) > 1 and present[-1] == 'chosen':
      present.pop()  # it may be only the answer, as in TRL's format
    name = present[0]
    has_answer = name in ('chosen', 'rejected')
    messages = self._messages(row[name], has_answer or self.transcript)
    if self.system:
      messages = self._add_named_system(messages, row)
    elif name in MESSAGE_FIELDS:
      messages = _add_system(messages, row.get('system'), 'system')
    if has_answer and not _ends_with_answer(messages):
      raise UserError(
        f'A dialogue with its answer must end with the assistant, but got {show(messages[-1:])}.'
      )
    drop_answer = self.drop_answer
    for other in present[1:]:
      other_messages = self._messages(row[other], False)
      _check_same(name, messages, other, other_messages)
      drop_answer |= not _ends_with_answer(other_messages)  # it shows where the prompt ends
    is_label = isinstance(row[name], str) and not str(messages[-1]['content']).strip()
    if _ends_with_answer(messages) and (has_answer or drop_answer or is_label):
      return messages[:-1]
    return messages

  def _present(self, row: Mapping[str, Any]) -> list[str]:
    """Return the names of the fields that hold the row's prompt."""
    candidates = self.fields or DIALOGUE_FIELDS
    given = [name for name in candidates if name in row]
    if self.fields:
      present = [name for name in given if not _is_blank(row[name])][:1] or given[:1]
    else:
      present = [name for name in given if row[name] is not None]
    if not present:
      raise UserError(
        f'The row has none of the fields {list(candidates)}. It has {show(list(row), 200)}.'
      )
    return present

  def _messages(self, value: Any, is_transcript: bool) -> Messages:
    if isinstance(value, str) and self.plain:
      return [{'role': 'user', 'content': value}]
    if isinstance(value, list) and (self.message_keys or self.roles):
      value = [self._rename(message) for message in value]
    return parse_messages(value, is_transcript)

  def _rename(self, message: Any) -> Any:
    """Return a message with the usual keys and roles, and without other keys."""
    if not isinstance(message, dict):
      return message
    if self.message_keys:
      missing = [key for key in self.message_keys if key not in message]
      if missing:
        raise UserError(
          f'A message lacks the keys {missing} of message_keys. It has {show(list(message), 200)}.'
        )
      names = zip(('role', 'content'), self.message_keys, strict=True)
      message = {key: message[theirs] for key, theirs in names}
    role = 'from' if 'from' in message and 'role' not in message else 'role'
    if self.roles and isinstance(name := message.get(role), str):
      message = {**message, role: self.roles.get(name, name)}
    return message

  def _add_named_system(self, messages: Messages, row: Mapping[str, Any]) -> Messages:
    if self.system not in row:
      raise UserError(
        f'The row lacks the system field {self.system!r}. It has {show(list(row), 200)}.'
      )
    return _add_system(messages, row[self.system], self.system)

  def _add_context(self, messages: Messages, row: Mapping[str, Any]) -> Messages:
    """Return the messages with the row's context, if it has one, before the last message."""
    contexts = [row[name] for name in self.context if not _is_blank(row.get(name))]
    if not contexts:
      return messages
    *before, last = messages
    return [*before, {**last, 'content': f'{contexts[0]}{_CONTEXT_END}{last["content"]}'}]

  def _metadata(self, row: Mapping[str, Any]) -> dict[str, str]:
    """Return the row's metadata together with the named fields, as text."""
    missing = [name for name in self.required if name not in row]
    if missing:
      raise UserError(
        f'The row lacks the metadata fields {missing}. It has {show(list(row), 200)}.'
      )
    named = {
      name: _as_text(row[fields[0]])
      for name, candidates in self.metadata.items()
      if (fields := [field for field in candidates if not _is_blank(row.get(field))])
    }
    # A named set says where its metadata is; another field of that name has its own meaning.
    own = {} if self.metadata else _own_metadata(row)
    return own | named | {name: str(row[name]) for name in self.required}


def _add_system(messages: Messages, system: Any, field: str) -> Messages:
  """Return the messages with the text of the row's system field as a message, if it has one."""
  if _is_blank(system):
    return messages
  message = {'role': 'system', 'content': system}
  if messages[:1] == [message]:
    return messages
  if any(other['role'] == 'system' for other in messages):
    raise UserError(
      f'The row has the field {field!r} and another system message. Remove one of the two.'
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


def _is_blank(value: Any) -> bool:
  return value is None or (isinstance(value, str) and not value.strip())


def _as_text(value: Any) -> str:
  """Return a value as text. A list, also one that is written as text, becomes 'one, other'."""
  if isinstance(value, str) and value.startswith('[') and value.endswith(']'):
    try:
      value = ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
      return value
  return ', '.join(map(str, value)) if isinstance(value, list) else str(value)


def _parse_id(value: Any) -> str:
  if isinstance(value, bool) or not isinstance(value, str | int) or value == '':
    raise UserError(f'An id must be an integer or non-empty text, but got {show(value)}.')
  if isinstance(value, int) and abs(value) >= 10**MAX_ID:
    raise UserError(f'An id must have at most {MAX_ID} characters, but got {show(value)}.')
  return str(value)


def _own_metadata(row: Mapping[str, Any]) -> dict[str, str]:
  """Return the row's field `metadata`."""
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
  return {name: value for name, value in metadata.items() if value is not None}
