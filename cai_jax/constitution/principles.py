"""Principles, constitutions, and the draw of principles for a prompt."""

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np

from cai_jax.dialogue.messages import REPLY_ROLES, REQUEST_ROLES
from cai_jax.runtime.errors import UserError, show
from cai_jax.runtime.text_files import check_characters

MAX_WEIGHT = 1e100  # keeps sums of weights finite
MAX_ID = 200  # characters
REQUIRED_FIELDS = ('id', 'critique_request', 'revision_request')
PRINCIPLE_FIELDS = (*REQUIRED_FIELDS, 'weight', 'tags', 'comparison_request')
_OPTIONAL = ('comparison_request',)
# What a principle without a `comparison_request` asks about two responses.
IMPLIED_COMPARISON = (
  'Consider this request to rewrite a response: "{}" Choose the response that needs less rewriting.'
)


@dataclasses.dataclass(frozen=True)
class Principle:
  """One rule, as a pair of requests to the model.

  Attributes:
    id: unique name within the constitution.
    critique_request: asks for a critique of the latest response.
    revision_request: asks for a revision of the latest response.
    weight: relative probability of being drawn, above 0 and at most `MAX_WEIGHT`.
    tags: names by which a config can select the principle.
    comparison_request: asks which of two responses is better, for AI feedback; '' leaves it to
      `comparison`.

  Raises:
    UserError: if the id or a request is blank, or the weight is out of range.
  """

  id: str
  critique_request: str
  revision_request: str
  weight: float = 1.0
  tags: tuple[str, ...] = ()
  comparison_request: str = ''

  def __post_init__(self) -> None:
    for name in (*REQUIRED_FIELDS, *(() if self.comparison_request == '' else _OPTIONAL)):
      value = getattr(self, name)
      if not isinstance(value, str) or not value.strip():
        raise UserError(f'{name} must be non-blank text, but got {show(value)}.')
      check_characters(name, value)
    if not self.id.isprintable() or len(self.id) > MAX_ID:
      raise UserError(
        f'id must be printable text of at most {MAX_ID} characters, but got {show(self.id)}.'
      )
    weight = self.weight
    if isinstance(weight, bool) or not isinstance(weight, int | float):
      raise UserError(f'weight must be a number above 0, but got {show(weight)}.')
    if not 0 < weight <= MAX_WEIGHT:
      raise UserError(f'weight must be above 0 and at most {MAX_WEIGHT:g}, but got {show(weight)}.')
    if isinstance(self.tags, str) or not all(
      isinstance(tag, str) and tag.isprintable() and tag for tag in self.tags
    ):
      raise UserError(f'tags must be a list of names, but got {show(self.tags)}.')
    object.__setattr__(self, 'tags', tuple(self.tags))

  @property
  def comparison(self) -> str:
    """What a feedback model is asked about two responses.

    A principle without a `comparison_request` quotes its revision request, which says what a good
    response is like, see `IMPLIED_COMPARISON`.
    """
    return self.comparison_request or IMPLIED_COMPARISON.format(self.revision_request)


@dataclasses.dataclass(frozen=True)
class Constitution:
  """Principles and few-shot demonstrations.

  Attributes:
    principles: at least one, with distinct ids.
    demonstrations: dialogues, each a sequence of {'role', 'content'} messages. Requests and replies
      alternate; the first message is a request and the last is a reply.
    drawn_from: the principles before some were left out, in the order of the file; () means that
      none were. See `draw_principles`.
    sections: (id of a principle, text) of the document that the principles come from, in its order;
      () if they come from a list.

  Raises:
    UserError: if there is no principle, an id occurs twice, or a demonstration is malformed.
  """

  principles: tuple[Principle, ...]
  demonstrations: tuple[tuple[dict[str, str], ...], ...] = ()
  drawn_from: tuple[Principle, ...] = ()
  sections: tuple[tuple[str, str], ...] = ()

  def __post_init__(self) -> None:
    object.__setattr__(self, 'principles', tuple(self.principles))
    object.__setattr__(self, 'demonstrations', tuple(tuple(d) for d in self.demonstrations))
    if not self.principles:
      raise UserError('A constitution needs at least one principle, but got none.')
    first_index: dict[str, int] = {}
    for i, principle in enumerate(self.principles):
      if principle.id in first_index:
        raise UserError(
          f'Principles {first_index[principle.id]} and {i} share the id {principle.id!r}. '
          'Give each principle its own id.'
        )
      first_index[principle.id] = i
    for i, dialogue in enumerate(self.demonstrations):
      _check_demonstration(i, dialogue)

  def fingerprint(self) -> str:
    """Return a hash of all that chains read: 16 hex digits, the same on every machine.

    Only labels depend on the comparison requests, see `comparisons_fingerprint`.
    """
    fields = dataclasses.asdict(self)
    for name in ('drawn_from', 'sections'):
      if not fields[name]:  # earlier versions left out no principle, and read no document
        del fields[name]
    for principle in (*fields['principles'], *fields.get('drawn_from', ())):
      del principle['comparison_request']
    return _digest(fields)

  def comparisons_fingerprint(self) -> str:
    """Return a hash of all that AI feedback reads: 16 hex digits, the same on every machine."""
    drawn = self.drawn_from or self.principles
    return _digest([self.fingerprint(), [principle.comparison for principle in drawn]])

  @property
  def document(self) -> str:
    """The sections of the principles as one text; '' if the principles come from a list."""
    kept = {principle.id for principle in self.principles}
    return '\n\n'.join(text for name, text in self.sections if name in kept)


def _digest(content: Any) -> str:
  text = json.dumps(content, sort_keys=True, ensure_ascii=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def draw_principles(
  constitution: Constitution, seed: int, prompt_id: str, rounds: int, replace: bool = True
) -> tuple[Principle, ...]:
  """Draw one principle per round for a prompt, in proportion to the principles' weights.

  The draw is a pure function of the arguments and the same on every machine. The first n of N
  rounds equal the draw for n rounds.

  If principles are left out, a round that draws one of them draws again, until it has one that is
  kept. So the others keep their relative probabilities, and all rounds before the first draw of a
  principle that is left out are those of the whole constitution.

  Args:
    constitution: the principles to draw from.
    seed: the seed of the run.
    prompt_id: each prompt gets its own draw.
    rounds: how many principles to draw, at least 0.
    replace: draw each round independently. If false, no principle is drawn twice.

  Raises:
    UserError: if `rounds` is negative, or exceeds the number of principles without `replace`.
  """
  principles = constitution.principles
  if rounds < 0:
    raise UserError(f'rounds must be at least 0, but got {rounds}.')
  if not replace and rounds > len(principles):
    raise UserError(
      f'{rounds} rounds without repetition need {rounds} principles, but the constitution has '
      f'{len(principles)}. Use fewer rounds, add principles, or allow principles to repeat.'
    )
  digest = hashlib.sha256(json.dumps([int(seed), prompt_id]).encode()).digest()
  rng = np.random.default_rng(np.frombuffer(digest, '<u4'))
  kept = {principle.id for principle in principles}
  remaining, drawn = list(constitution.drawn_from or principles), []
  for _ in range(rounds):
    candidates = list(remaining)
    principle = _pop_drawn(candidates, rng.random())
    while principle.id not in kept:
      principle = _pop_drawn(candidates, rng.random())
    drawn.append(principle)
    if not replace:
      remaining = candidates
  return tuple(drawn)


def _pop_drawn(candidates: list[Principle], uniform: float) -> Principle:
  """Remove and return the principle that a number in [0, 1) draws, in proportion to the weights."""
  cumulative = np.cumsum([principle.weight for principle in candidates])
  index = int(np.searchsorted(cumulative, uniform * cumulative[-1], side='right'))
  return candidates.pop(min(index, len(candidates) - 1))


def _check_demonstration(index: int, dialogue: tuple[dict[str, str], ...]) -> None:
  """Raise UserError unless requests and replies alternate and every content is non-blank text."""
  where = f'Demonstration {index}'
  for i, message in enumerate(dialogue):
    if not isinstance(message, dict) or set(message) != {'role', 'content'}:
      raise UserError(
        f"{where}: message {i} must have the keys 'role' and 'content', but got {show(message)}."
      )
    allowed = REPLY_ROLES if i % 2 else REQUEST_ROLES
    if message['role'] not in allowed:
      raise UserError(
        f'{where}: message {i} has the role {show(message["role"])}. Requests {REQUEST_ROLES} and '
        f'replies {REPLY_ROLES} must alternate, starting with a request.'
      )
    if not isinstance(message['content'], str) or not message['content'].strip():
      raise UserError(f'{where}: the content of message {i} must be non-blank text.')
    check_characters(f'{where}: the content of message {i}', message['content'])
  if not dialogue or len(dialogue) % 2:
    raise UserError(
      f'{where} must end with a reply {REPLY_ROLES}; it has {len(dialogue)} messages.'
    )
