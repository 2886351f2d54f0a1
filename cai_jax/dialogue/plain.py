"""The plain form of a dialogue, as Bai et al. 2022 print it: labels and contents."""

import re
from collections.abc import Iterable

from cai_jax.runtime.errors import UserError

LABELS = {
  'user': '\n\nHuman:',
  'assistant': '\n\nAssistant:',
  'critique_request': '\n\nCritiqueRequest:',
  'critique': '\n\nCritique:',
  'revision_request': '\n\nRevisionRequest:',
  'revision': '\n\nRevision:',
}


REQUEST_ROLES = ('user', 'critique_request', 'revision_request')


REPLY_ROLES = ('assistant', 'critique', 'revision')


def join_plain(messages) -> str:
  """Returns the dialogue as the paper prints it: each content after its label and a space."""
  return ''.join(f'{LABELS[message["role"]]} {message["content"]}' for message in messages)


def split_plain(text: str, roles: Iterable[str] = tuple(LABELS)) -> list[dict[str, str]]:
  """Returns the messages of a dialogue in the paper's plain form; `join_plain` inverts it.

  Args:
    text: labels and contents. A label counts only after an empty line, so that "Human: " inside a
      content stays there. One space after a label belongs to the label.
    roles: those whose labels count.

  Raises:
    ValueError: the text does not begin with a label.
  """
  role_of = {LABELS[role]: role for role in roles}
  head, *rest = re.split('(' + '|'.join(map(re.escape, role_of)) + ')', text)
  if head or not rest:
    raise UserError(
      f'a plain dialogue begins with one of the labels {list(role_of)}, got {text[:60]!r}'
    )
  return [
    {'role': role_of[label], 'content': content.removeprefix(' ')}
    for label, content in zip(rest[::2], rest[1::2], strict=True)
  ]
