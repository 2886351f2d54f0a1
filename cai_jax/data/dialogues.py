"""Dialogues in the shapes in which people keep them, read as messages with 'role' and 'content'.

A dialogue is one of these:

  - a list of messages with 'role' and 'content' (OpenAI) or with 'from' and 'value' (ShareGPT)
  - such a list as JSON text, as in the cells of a table
  - a transcript in one text: "Human: ...", an empty line, "Assistant: ..." (HH-RLHF); the first
    label may follow white space
  - any other text, which is the message of a user

A text that looks like a transcript with other labels, such as "User:" or "<|im_start|>", is an
error: its labels would otherwise become a part of the user's words.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cai_jax.dialogue.plain import split_plain
from cai_jax.runtime.errors import UserError, show
from cai_jax.runtime.text_files import check_characters, parse_json

ROLES = ('system', 'user', 'assistant')

Messages = list[dict[str, Any]]

_OTHER_ROLE_NAMES = {
  'developer': 'system',
  'human': 'user',
  'gpt': 'assistant',
  'chatgpt': 'assistant',
  'model': 'assistant',
  'bot': 'assistant',
}
# Fields about a message that chat logs (WildChat) and trainers (Axolotl) add; prompts lack them.
_METADATA = frozenset(
  ('country', 'hashed_ip', 'header', 'language', 'redacted', 'state', 'timestamp', 'toxic')
  + ('train', 'turn_identifier', 'weight')
)
_TEXT_PARTS = ('text', 'input_text', 'output_text')

_JSON_MESSAGES = re.compile(r'\s*\[\s*\{\s*[\'"](?:role|content|from|value|name)[\'"]\s*:')
_FIRST_LABEL = re.compile(r'[\s\ufeff]*(?=(?:Human|Assistant):)')
_BLANK_LINE = re.compile(r'\n[ \t]+(?=\n(?:Human|Assistant):)')
# Labels of other forms. Marks such as **, ### and [ may surround a label, and texts that were
# escaped twice begin with a backslash and an n.
_MARKS = r'(?:\\[nr]|[\s\ufeff*#>_\[(<|])*'
_COLON = r'[\s*_\])>|]*[:\uff1a]'
_OTHER_START = re.compile(
  rf'{_MARKS}(?:human|user|prompter|instruction){_COLON}'
  r'|\s*(?:<s>\s*)?\[INST\]|\s*<<SYS>>|\s*(?:<s>\s*)?Human:'
  r'|\s*<\|?(?:im_start|start_header_id|start_of_turn_token|begin_of_text|prompter|user|system)\|?>'
  r'|\s*(?:<bos>\s*)?<start_of_turn>|\s*<\uff5c[^|\n]{1,30}\uff5c>',
  re.IGNORECASE,
)
_LETTER_START = re.compile(rf'{_MARKS}[HU]{_COLON}')
_LETTER_REPLY = re.compile(r'^[ \t*#>_]*(?:A|AI|Bot|Assistant)[ \t*_]*:', re.MULTILINE)
_REPLY_LINE = re.compile(
  r'^[ \t*#>_]*(?:assistant|ai|bot|chatbot|gpt|chatgpt|claude)[ \t*_]*[:\uff1a]',
  re.MULTILINE | re.IGNORECASE,
)
_REPLY_LABEL = re.compile(
  r'[ \t*#>_\[(<|]*(?:im_start\|>)?(?:assistant|(?<=# )response)[ \t*_\])>|]*[:\uff1a]?[ \t*]*',
  re.IGNORECASE,
)
_INLINE_REPLY_END = re.compile(
  r'(?:\b(?:Assistant|ASSISTANT)[ \t*]*[:\uff1a]|<\|?assistant\|?>|\[/INST\])\Z'
)
_LINE_LABELS = re.compile(r'^Human:', re.MULTILINE), re.compile(r'^Assistant:', re.MULTILINE)


def parse_messages(value: Any, is_transcript: bool = False) -> Messages:
  """Return the messages of a dialogue in any of the shapes of this module.

  The messages may end with an answer of the assistant; the final "Assistant:" of a transcript is an
  empty answer. `check_prompt` checks what this function does not: contents, and order of roles.

  Args:
    value: the dialogue.
    is_transcript: whether a text must be a transcript.

  Raises:
    UserError: if the value has none of these shapes.
  """
  if isinstance(value, str):
    return _parse_text(value, is_transcript)
  if not isinstance(value, list):
    raise UserError(f'A dialogue must be text or a list of messages, but got {show(value)}.')
  return [_parse_message(i, message) for i, message in enumerate(value)]


def check_prompt(messages: Sequence[Mapping[str, Any]]) -> None:
  """Check that messages are a dialogue that awaits the assistant.

  Raises:
    UserError: if they are not: a message has other keys, a content is not text, or the roles have
      another order.
  """
  for i, message in enumerate(messages):
    if not isinstance(message, dict) or set(message) != {'role', 'content'}:
      raise UserError(
        f"Message {i} must be an object with the keys 'role' and 'content', but got "
        f'{show(message)}.'
      )
    role, content = message['role'], message['content']
    if role not in ROLES:
      hint = ' Tools are not supported: leave the row out.' if role in ('tool', 'function') else ''
      raise UserError(
        f'Message {i} has the role {show(role)}. The allowed roles are {ROLES}.{hint}'
      )
    if not isinstance(content, str) or not content.strip():
      raise UserError(
        f'The content of message {i} ({role}) must be non-blank text, but got {show(content)}.'
      )
    check_characters(f'The content of message {i} ({role})', content)
  roles = [message['role'] for message in messages]
  turns = roles[1:] if roles[:1] == ['system'] else roles
  if len(turns) % 2 == 0 or turns != (['user', 'assistant'] * len(turns))[: len(turns)]:
    hint = (
      ' Set drop_answer=True to leave out a final answer, or put a dialogue with its answer into '
      "the field 'chosen'."
    )
    raise UserError(
      'A prompt must be an optional system message, then alternating user and assistant messages, '
      f'with the user first and last, but got the roles {show(roles)}.'
      f'{hint if roles[-1:] == ["assistant"] else ""}'
    )


def parse_transcript(text: str) -> Messages:
  """Parse a dialogue in the plain form of HH-RLHF.

  Only "Human:" and "Assistant:" after an empty line are labels; the first one may also follow other
  white space, or none. Some published rows have the same label twice in a row; such turns are
  joined with an empty line. A final "Assistant:" is an empty turn.

  Args:
    text: the transcript.

  Returns:
    Messages with 'role' and 'content'.

  Raises:
    UserError: if the text does not begin with a label, or has labels without an empty line.
  """
  if '\r' in text:
    text = text.replace('\r\n', '\n').replace('\r', '\n')
  if first := _FIRST_LABEL.match(text):
    text = _BLANK_LINE.sub('\n', '\n\n' + text[first.end() :])
  turns = split_plain(text, ('user', 'assistant'))
  messages = [
    {'role': role, 'content': '\n\n'.join(turn['content'] for turn in group)}
    for role, group in itertools.groupby(turns, key=lambda turn: turn['role'])
  ]
  last = messages[-1]['content']
  if messages[-1]['role'] == 'user' and (
    _ends_with_reply_label(last) or (len(messages) == 1 and _REPLY_LINE.search(last))
  ):
    raise UserError(
      'A label of the assistant does not follow an empty line: '
      f'{show(last[-60:])}. Write "\\n\\nHuman: ...\\n\\nAssistant:".'
    )
  return messages


def _parse_text(text: str, is_transcript: bool) -> Messages:
  if _JSON_MESSAGES.match(text):
    try:
      value = parse_json(text)
    except ValueError as error:
      raise UserError(
        f'The text looks like a list of messages, but it is not valid JSON: {show(text)} ({error}).'
      ) from error
    return parse_messages(value)
  if is_transcript or _FIRST_LABEL.match(text):
    return parse_transcript(text)
  if _has_other_labels(text):
    raise UserError(
      f'The text {show(text, 60)} looks like a transcript with other labels than "Human:" and '
      '"Assistant:", or with a text before them. Write "\\n\\nHuman: ...\\n\\nAssistant:", or give '
      'messages, whose contents are never parsed.'
    )
  return [{'role': 'user', 'content': text}]


def _has_other_labels(text: str) -> bool:
  """Return whether a text is probably a transcript that `parse_transcript` cannot read."""
  if _OTHER_START.match(text) or _ends_with_reply_label(text):
    return True
  if _LETTER_START.match(text) and _LETTER_REPLY.search(text):
    return True
  human = _LINE_LABELS[0].search(text)
  return human is not None and _LINE_LABELS[1].search(text, human.end()) is not None


def _ends_with_reply_label(text: str) -> bool:
  """Return whether a text ends with a label of the assistant, which no answer follows.

  Only labels in one of their usual spellings count at the end of a line that has other text.
  """
  text = text.rstrip()
  if _INLINE_REPLY_END.search(text, max(0, len(text) - 40)):
    return True
  before, _, last = text.rpartition('\n')
  if not before.strip() or not (last.endswith((':', '\uff1a', '>')) or last.startswith('<|')):
    return False
  return _REPLY_LABEL.fullmatch(last) is not None


def _parse_message(index: int, message: Any) -> dict[str, Any]:
  """Return a message with the keys 'role' and 'content' only."""
  if not isinstance(message, dict):
    raise UserError(
      f"Message {index} must be an object with the keys 'role' and 'content', but got "
      f'{show(message)}.'
    )
  fields = {key: value for key, value in message.items() if value is not None and value != []}
  names = ('from', 'value') if 'from' in fields and 'role' not in fields else ('role', 'content')
  others = [key for key in fields if key not in names and key not in _METADATA]
  if others:
    raise UserError(
      f'Message {index} has the fields {show(others)}, but a message has only '
      f'{list(names)}. Remove the others, or leave the row out if they matter.'
    )
  if names[0] not in message or names[1] not in message:
    raise UserError(
      f"Message {index} must be an object with the keys 'role' and 'content', but got "
      f'{show(message)}.'
    )
  role, content = message[names[0]], message[names[1]]
  if isinstance(role, str):
    role = _OTHER_ROLE_NAMES.get(role.lower(), role.lower())
  return {'role': role, 'content': _join_parts(index, content)}


def _join_parts(index: int, content: Any) -> Any:
  """Return the text of a content that is a list of parts; any other content as it is."""
  if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
    return content
  texts = []
  for part in content:
    if part.get('type') not in _TEXT_PARTS or not isinstance(part.get('text'), str):
      raise UserError(
        f'The content of message {index} has the part {show(part)}. Only parts of the form '
        '{"type": "text", "text": ...} are supported.'
      )
    texts.append(part['text'])
  return '\n'.join(texts)
