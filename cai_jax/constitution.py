"""The constitution C: its plain-text labels, its principles, and how principles are drawn.

YAML form (`load` of a .yaml or .yml file; see constitution.yaml beside this module):

  principles:
    - id: no_insults                 # unique; kept in every record
      critique_request: ...          # asks for the critique c
      revision_request: ...          # asks for the revision y_rev
      weight: 1.0                    # optional: relative chance of being drawn, above 0
      tags: [respect, general]       # optional: names by which `load(path, tags=...)` selects
  demonstrations:                    # optional few-shot dialogues, put before every prompt
    - - {role: user, content: ...}
      - {role: assistant, content: ...}
      - {role: critique_request, content: ...}
      - {role: critique, content: ...}
      - {role: revision_request, content: ...}
      - {role: revision, content: ...}

`load` also reads the form published with Bai et al. 2022, "Constitutional AI: Harmlessness from AI
Feedback" (repository anthropics/ConstitutionalHarmlessnessPaper): a CritiqueRevisionInstructions
.json file, or a folder that holds it and maybe CritiqueRevisionFewShotPrompts.json.
"""

import dataclasses
import hashlib
import json
import math
import os
import re

import numpy as np
import yaml

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

_ROLE_OF_LABEL = {label: role for role, label in LABELS.items()}
_ANY_LABEL = re.compile('(' + '|'.join(re.escape(label) for label in LABELS.values()) + ')')

_INSTRUCTIONS = 'CritiqueRevisionInstructions.json'
_FEW_SHOT = 'CritiqueRevisionFewShotPrompts.json'
_PRINCIPLE_FIELDS = ('id', 'critique_request', 'revision_request', 'weight', 'tags')


@dataclasses.dataclass(frozen=True)
class Principle:
  """One rule: what the critique is asked for, and what the revision is asked for.

  Raises:
    ValueError: an empty id or request, or a weight that is not a finite number above 0.
  """

  id: str
  critique_request: str
  revision_request: str
  weight: float = 1.0
  tags: tuple[str, ...] = ()

  def __post_init__(self):
    for name in ('id', 'critique_request', 'revision_request'):
      value = getattr(self, name)
      if not isinstance(value, str) or not value.strip():
        raise ValueError(f'{name} must be a text that is not blank, got {value!r}')
    weight = self.weight
    if isinstance(weight, bool) or not isinstance(weight, int | float):
      raise ValueError(f'weight must be a number above 0, got {weight!r}')
    if not (math.isfinite(weight) and weight > 0):
      raise ValueError(f'weight must be a finite number above 0, got {weight!r}')
    if isinstance(self.tags, str) or not all(isinstance(tag, str) and tag for tag in self.tags):
      raise ValueError(f'tags must be a list of names, got {self.tags!r}')
    object.__setattr__(self, 'tags', tuple(self.tags))


@dataclasses.dataclass(frozen=True)
class Constitution:
  """Principles and few-shot demonstrations.

  Attributes:
    principles: at least one; their ids differ.
    demonstrations: dialogues of `{'role', 'content'}` messages, each from a request to a reply.

  Raises:
    ValueError: no principle, a repeated id, or a demonstration that is no such dialogue.
  """

  principles: tuple[Principle, ...]
  demonstrations: tuple[tuple[dict[str, str], ...], ...] = ()

  def __post_init__(self):
    object.__setattr__(self, 'principles', tuple(self.principles))
    object.__setattr__(self, 'demonstrations', tuple(tuple(d) for d in self.demonstrations))
    if not self.principles:
      raise ValueError('a constitution needs at least one principle, got none')
    first = {}
    for i, principle in enumerate(self.principles):
      if principle.id in first:
        raise ValueError(
          f'principles {first[principle.id]} and {i} share the id {principle.id!r}; '
          f'give each its own'
        )
      first[principle.id] = i
    for i, dialogue in enumerate(self.demonstrations):
      _check_demonstration(i, dialogue)

  def fingerprint(self) -> str:
    """Returns a hash of the whole content, 16 hex digits, the same on every machine."""
    content = json.dumps(dataclasses.asdict(self), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _check_demonstration(index: int, dialogue: tuple[dict[str, str], ...]) -> None:
  """Raises ValueError unless requests and replies alternate and every content is a text."""
  where = f'demonstration {index}'
  for i, message in enumerate(dialogue):
    if not isinstance(message, dict) or set(message) != {'role', 'content'}:
      raise ValueError(f"{where}: message {i} needs the keys 'role' and 'content', got {message!r}")
    allowed = REPLY_ROLES if i % 2 else REQUEST_ROLES
    if message['role'] not in allowed:
      raise ValueError(
        f'{where}: message {i} has the role {message["role"]!r}; requests {REQUEST_ROLES} and '
        f'replies {REPLY_ROLES} take turns, a request first'
      )
    if not isinstance(message['content'], str) or not message['content'].strip():
      raise ValueError(f'{where}: message {i} needs a text that is not blank as its content')
  if not dialogue or len(dialogue) % 2:
    raise ValueError(
      f'{where} must end with a reply {REPLY_ROLES}; it has {len(dialogue)} messages'
    )


def join_plain(messages) -> str:
  """Returns the dialogue as the paper prints it: each content after its label and a space."""
  return ''.join(f'{LABELS[message["role"]]} {message["content"]}' for message in messages)


def split_plain(text: str) -> list[dict[str, str]]:
  """Returns the messages of a dialogue in the paper's plain form; `join_plain` inverts it.

  A label counts only after an empty line, so that "Human: " inside a content stays there. One
  space after a label belongs to the label.

  Raises:
    ValueError: the text does not begin with a label.
  """
  head, *rest = _ANY_LABEL.split(text)
  if head or not rest:
    raise ValueError(
      f'a plain dialogue begins with one of the labels {list(_ROLE_OF_LABEL)}, got {text[:60]!r}'
    )
  labels, contents = rest[::2], rest[1::2]
  return [
    {'role': _ROLE_OF_LABEL[label], 'content': content.removeprefix(' ')}
    for label, content in zip(labels, contents, strict=True)
  ]
