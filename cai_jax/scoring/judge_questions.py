"""The question that a judge reads about a match."""

from collections.abc import Sequence

from cai_jax.dialogue import Message
from cai_jax.dialogue.plain import LABELS, join_plain
from cai_jax.runtime.errors import UserError
from cai_jax.scoring.judge import Match

OPTIONS = (' (A)', ' (B)')
OPENING = 'The answer is:'  # what the judge's answer begins with; a label follows
# What replaces the opening if the judge writes before it answers.
REASON_FIRST = (
  'Think step by step about which option fits better. Then write "The answer is: (A)" or '
  '"The answer is: (B)".'
)


def build_question(messages: Sequence[Message], principle: str, a: str, b: str) -> str:
  """Return the question of a judge, up to the opening of its answer.

  A system message comes before the conversation, unchanged. White space around a response is
  removed. Nothing prevents a response from imitating the label of an option.

  Args:
    messages: the messages of the prompt, ending with the user's.
    principle: the instruction to the judge. It may end with 'Options:', as published ones do.
    a: the response shown as option (A).
    b: the response shown as option (B).

  Raises:
    UserError: if the messages do not end with the user's or have an unknown role, or the principle
      or a response is blank.
  """
  roles = [message['role'] for message in messages]
  turns = messages[1:] if roles[:1] == ['system'] else messages
  if not turns or any(m['role'] not in LABELS for m in turns) or turns[-1]['role'] != 'user':
    raise UserError(
      f'The messages have the roles {roles}. After an optional system message, each role must be '
      f'one of {list(LABELS)}, and the last one must be "user".'
    )
  instruction = principle.strip().removesuffix('Options:').rstrip()
  for name, text in (('principle', instruction), ('response (A)', a), ('response (B)', b)):
    if not text.strip():
      raise UserError(f'The {name} is {text!r}. A judge cannot compare blank texts; leave it out.')
  system = '' if turns is messages else f'{messages[0]["content"].strip()}\n\n'
  return (
    f'{system}Here is a conversation between a human and an assistant, whose next answer is to be '
    f'chosen from two.{join_plain(turns)}\n\n'
    f'{instruction} Options:\n (A) {a.strip()}\n (B) {b.strip()}'
  )


def build_questions(match: Match) -> tuple[str, str]:
  """Return the question of a match in both orders: the first response as (A), then as (B).

  Raises:
    UserError: as `build_question`.
  """
  first, second = match.responses
  return (
    build_question(match.messages, match.principle, first, second),
    build_question(match.messages, match.principle, second, first),
  )
