"""Messages, their roles, and the order in which roles may follow each other."""

import numbers
import re
from collections.abc import Sequence
from typing import Any

from cai_jax.runtime.errors import UserError

# {'role': str, 'content': str | Sequence[int]}. A content is text, or the token ids of a sampled
# reply, including its end token if it has one.
Message = dict[str, Any]

REQUEST_ROLES = ('user', 'critique_request', 'revision_request')
REPLY_ROLES = ('assistant', 'critique', 'revision')
ROLES = ('system', *REQUEST_ROLES, *REPLY_ROLES)
# The role of a message as chat templates and chat APIs know it.
CHAT_ROLE = {
  'system': 'system',
  **{role: 'user' for role in REQUEST_ROLES},
  **{role: 'assistant' for role in REPLY_ROLES},
}

_SURROGATE = re.compile('[\ud800-\udfff]')


def check_prompt(messages: Sequence[Message], reply_role: str) -> None:
  """Check that the messages end with a request and that `reply_role` can answer it.

  A system message can only come first.

  Args:
    messages: the dialogue.
    reply_role: the role of the reply, one of `REPLY_ROLES`.

  Raises:
    UserError: if a message has no role or no content, or a role is unknown or misplaced.
  """
  check_form(messages)
  roles = [message['role'] for message in messages]
  unknown = [role for role in roles if role not in ROLES]
  if unknown:
    raise UserError(
      f'The messages have unknown roles {unknown}. The allowed roles are {sorted(ROLES)}.'
    )
  check_reply_role(reply_role)
  if not roles or roles[-1] not in REQUEST_ROLES:
    raise UserError(f'A prompt must end with a request {REQUEST_ROLES}, but got the roles {roles}.')
  if 'system' in roles[1:]:
    raise UserError(f'A system message can only come first, but got the roles {roles}.')
  for message in messages:
    check_text(message['content'])


def check_form(messages: Sequence[Message]) -> None:
  """Check that each message is a dict with a role, and a content of text or token ids.

  Raises:
    UserError: if one is not.
  """
  for number, message in enumerate(messages):
    if isinstance(message, dict) and isinstance(message.get('role'), str):
      content = message.get('content')
      if isinstance(content, str) or (
        isinstance(content, Sequence)
        and all(issubclass(kind, numbers.Integral) for kind in {*map(type, content)})
      ):
        continue
    raise UserError(
      f'Message {number} is {message!r:.80}. A message is '
      "{'role': 'user', 'content': text}; a content with several parts must be joined to one text."
    )


def check_text(content: str | Sequence[int]) -> None:
  """Check that a content, if it is text, can be encoded.

  Raises:
    UserError: if it contains half of a surrogate pair.
  """
  if isinstance(content, str) and not content.isascii() and (found := _SURROGATE.search(content)):
    raise UserError(
      f'A content has an unpaired surrogate, {found[0]!r}, at character {found.start()}: '
      f'{content!r:.60}. Remove it.'
    )


def check_reply_role(role: str) -> None:
  """Check that `role` is one of `REPLY_ROLES`.

  Raises:
    UserError: if it is not.
  """
  if role not in REPLY_ROLES:
    raise UserError(f'reply_role must be one of {REPLY_ROLES}, but got {role!r}.')


def check_ends_with_reply(messages: Sequence[Message]) -> None:
  """Check that the last message is a reply.

  Raises:
    UserError: if it is not, or there is no message.
  """
  roles = [message['role'] for message in messages]
  if not roles or roles[-1] not in REPLY_ROLES:
    raise UserError(f'The dialogue must end with a reply {REPLY_ROLES}, but got the roles {roles}.')


def split_system(messages: Sequence[Message]) -> tuple[Sequence[Message], Sequence[Message]]:
  """Split a dialogue into its system message, if it has one, and its turns.

  Args:
    messages: the dialogue.

  Returns:
    The system messages, none or one, and the turns.
  """
  count = int(messages[0]['role'] == 'system')
  return messages[:count], messages[count:]
