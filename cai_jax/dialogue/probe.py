"""Checks that a prompt format keeps every message: in its place, once, unchanged.

A chat template is a program, and many of them drop, move or rewrite messages without an error. The
checks compare what a template wrote with what it was given, before anything is sampled.
"""

import re
from collections.abc import Sequence

from cai_jax.runtime.errors import UserError

# Marks of reasoning and of channels that no code here reads. `<think>` is read if it is a control
# token, see `Encoder.split_reply`.
_UNREAD_MARKS = re.compile(
  r'<\|?channel\|?>|\[/?THINK\]|</?(?:thinking|thought|reasoning)>|<\|(?:START|END)_THINKING\|>'
  r'|<\|?/?(?:seed:)?think\|>|<seed:think>|◁/?think▷'
)
_THINK = re.compile('</?think>')

# Short texts that any reply must be able to hold.
SAMPLE_REPLIES = (
  'Mix flour, then wait.',
  'One.\n\n- two  three',
  '1 < 2 & "x" {{ y }} <b>é 語 🙂</b>',
)
_LONG = 'It says: is 1 < 2 & "x" {{ y }} {% z %}?\n\n  - It\'s so,  É 語. \tLine\n' * 200


def probe_texts(count: int) -> list[str]:
  """Return different texts of about 10,000 characters, with white space and markup of many kinds.

  Args:
    count: number of texts.
  """
  return [f'{"  " * (i % 2)}Message {i} begins. {_LONG}Message {i} ends.\n' for i in range(count)]


def find_unread_mark(template: str, control: Sequence[str]) -> str | None:
  """Return a mark of reasoning or channels in a template that `Dialogue.decode` does not read.

  Args:
    template: the chat template.
    control: the spellings of the tokenizer's control tokens.
  """
  if mark := _UNREAD_MARKS.search(template):
    return mark[0]
  mark = _THINK.search(template)
  return mark[0] if mark and not {'<think>', '</think>'} <= {*control} else None


def check_slots(found: Sequence[int], between: Sequence[str], roles: Sequence[str]) -> None:
  """Check that a rendering contains each message once, in order, apart from the others.

  Args:
    found: the indices of the messages in the order in which the template wrote them.
    between: the markup before each of them.
    roles: the roles of the messages.

  Raises:
    UserError: if a message is lost, doubled, moved or merged with the one before it.
  """
  for index in range(len(roles)):
    if index not in found:
      raise damage(index, roles, 'loses')
    if found.count(index) > 1:
      raise damage(index, roles, 'doubles')
  moved = next((i for i, index in enumerate(found) if index != i), None)
  if moved is not None:
    # The message that comes too late: another one is in its place.
    raise damage(moved, roles, 'moves')
  for index in range(1, len(roles)):
    if roles[index - 1] != 'system' and not between[index].strip():
      raise damage(index, roles, 'merges', ' with the message before it')


def check_contents(
  texts: Sequence[str], expected: Sequence[str], rendered: str, roles: Sequence[str]
) -> None:
  """Check that a rendering contains the text of each message, in order.

  Args:
    texts: the contents of the messages.
    expected: what must remain of each content.
    rendered: what the template wrote.
    roles: the roles of the messages.

  Raises:
    UserError: if a text is missing.
  """
  position = 0
  for index, text in enumerate(expected):
    place = rendered.find(text, position)
    if place < 0:
      extra = f' of {len(texts[index])} characters, which begins {texts[index].strip()[:40]!r}'
      raise damage(index, roles, 'changes the content of', extra)
    position = place + len(text)


def describe_roles(roles: Sequence[str]) -> str:
  """Return the roles of a dialogue as text, shortened in the middle.

  Args:
    roles: the roles.
  """
  shown = [*roles[:4], f'... ({len(roles) - 6} more)', *roles[-2:]] if len(roles) > 8 else roles
  return ', '.join(shown)


def damage(index: int, roles: Sequence[str], verb: str, extra: str = '') -> UserError:
  """Return the error for a message that a template does not keep.

  Args:
    index: the index of the message.
    roles: the roles of all messages.
    verb: what the template does to it, such as 'loses'.
    extra: more about the message.
  """
  return UserError(
    f'The chat template {verb} message {index + 1} of {len(roles)} ({roles[index]}){extra}; the '
    f'roles are {describe_roles(roles)}. Each message must appear once, unchanged and in its '
    "place. Correct the template, change the messages, or use style='plain'."
  )
