"""Prompts: dialogues that end with the human's turn, from files, TFDS datasets and the hub.

One row, whatever it was read from, gives its dialogue in one of these fields (the first present):

  messages  [{"role": ..., "content": ...}, ...] ending with the user's turn
  prompt    the user's text, or such a list (TRL's conversational form)
  chosen    a dialogue with its answer (HH-RLHF); the prompt is everything before the last answer

A text that begins with a "\n\nHuman:" label is a plain dialogue in each of them. Optional fields of
a row: `id` (a text) and `metadata` (an object of texts); further fields are read only when named.
"""

import dataclasses

ROLES = ('system', 'user', 'assistant')


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One dialogue x that waits for the assistant's answer.

  Attributes:
    id: unique within a run; random keys are folded from it.
    messages: `{'role', 'content'}` dicts: an optional system message, then user and assistant in
      turn, the user first and last; every content is a text that is not blank.
    metadata: texts that travel with the prompt, such as its category.

  Raises:
    ValueError: any of this does not hold.
  """

  id: str
  messages: tuple[dict[str, str], ...]
  metadata: dict[str, str] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if not isinstance(self.id, str) or not self.id:
      raise ValueError(f'a prompt id must be a text that is not empty, got {self.id!r}')
    object.__setattr__(self, 'messages', tuple(self.messages))
    _check_messages(self.messages)
    strange = {k: v for k, v in self.metadata.items() if not isinstance(v, str)}
    if strange:
      raise ValueError(f'prompt metadata must be texts, got {strange!r}: make them texts')


def _check_messages(messages: tuple[dict[str, str], ...]) -> None:
  """Raises ValueError unless `messages` is a dialogue that waits for the assistant."""
  for i, message in enumerate(messages):
    if not isinstance(message, dict) or set(message) != {'role', 'content'}:
      raise ValueError(
        f"message {i} must be an object with the keys 'role' and 'content', got {message!r}"
      )
    if message['role'] not in ROLES:
      raise ValueError(f'message {i} has the role {message["role"]!r}; allowed are {ROLES}')
    if not isinstance(message['content'], str) or not message['content'].strip():
      raise ValueError(
        f'message {i} ({message["role"]}) needs a text that is not blank as its content, '
        f'got {message["content"]!r}'
      )
  roles = [message['role'] for message in messages]
  turns = roles[1:] if roles[:1] == ['system'] else roles
  if len(turns) % 2 == 0 or turns != (['user', 'assistant'] * len(turns))[: len(turns)]:
    raise ValueError(
      f'a prompt must be an optional system message, then user and assistant in turn, the user '
      f'first and last; got the roles {roles}'
    )
