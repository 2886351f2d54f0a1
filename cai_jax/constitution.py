"""The constitution: principles, few-shot demonstrations, and the draw of principles for a prompt.

A constitution is a YAML file of this form (see constitution.yaml beside this module):

  principles:
    - id: no_insults                 # unique; stored in every record
      critique_request: ...          # asks the model to critique its response
      revision_request: ...          # asks the model to revise its response
      weight: 1.0                    # optional: relative probability of being drawn, above 0
      tags: [respect, general]       # optional: names that `ConstitutionConfig.tags` can select
  demonstrations:                    # optional: few-shot dialogues, put before every prompt
    - - {role: user, content: ...}
      - {role: assistant, content: ...}
      - {role: critique_request, content: ...}
      - {role: critique, content: ...}
      - {role: revision_request, content: ...}
      - {role: revision, content: ...}

`load_constitution` also reads the JSON files published with Bai et al. 2022, "Constitutional AI:
Harmlessness from AI Feedback" (repository anthropics/ConstitutionalHarmlessnessPaper): either
CritiqueRevisionInstructions.json alone, or a folder that contains it and, optionally,
CritiqueRevisionFewShotPrompts.json.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import yaml

from cai_jax.dialogue.messages import REPLY_ROLES, REQUEST_ROLES
from cai_jax.dialogue.plain import LABELS, join_plain, split_plain
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.registry import Registry
from cai_jax.runtime.settings import setting

GENERAL = os.path.join(os.path.dirname(__file__), 'constitution.yaml')

# Paths of constitutions that a config can refer to by a short name.
CONSTITUTIONS: Registry[str] = Registry('constitution')
CONSTITUTIONS.register('general')(GENERAL)

MAX_WEIGHT = 1e100  # keeps sums of weights finite
_INSTRUCTIONS = 'CritiqueRevisionInstructions.json'
_FEW_SHOT = 'CritiqueRevisionFewShotPrompts.json'
_REQUIRED_FIELDS = ('id', 'critique_request', 'revision_request')
_PRINCIPLE_FIELDS = (*_REQUIRED_FIELDS, 'weight', 'tags')
_FIELDS_HINT = f'Allowed fields are {list(_PRINCIPLE_FIELDS)}; the first three are required.'


@dataclasses.dataclass(frozen=True)
class ConstitutionConfig:
  """Which constitution to load, and which of its principles to keep."""

  path: str = setting(
    'general',
    "'general', 'tiny', a YAML file, or the published JSON file of principles or its folder.",
    path=True,
  )
  tags: tuple[str, ...] = setting(
    (), 'Keep only principles that have at least one of these tags. () keeps all.'
  )
  ids: tuple[str, ...] = setting((), 'Keep only principles with these ids. () keeps all.')


@dataclasses.dataclass(frozen=True)
class Principle:
  """One rule, as a pair of requests to the model.

  Attributes:
    id: unique name within the constitution.
    critique_request: asks for a critique of the latest response.
    revision_request: asks for a revision of the latest response.
    weight: relative probability of being drawn, above 0 and at most `MAX_WEIGHT`.
    tags: names by which a config can select the principle.

  Raises:
    UserError: if the id or a request is blank, or the weight is out of range.
  """

  id: str
  critique_request: str
  revision_request: str
  weight: float = 1.0
  tags: tuple[str, ...] = ()

  def __post_init__(self) -> None:
    for name in _REQUIRED_FIELDS:
      value = getattr(self, name)
      if not isinstance(value, str) or not value.strip():
        raise UserError(f'{name} must be non-blank text, but got {value!r}.')
      if any('\ud800' <= character <= '\udfff' for character in value):
        raise UserError(f'{name} contains an unpaired surrogate: {value!r}.')
    weight = self.weight
    if isinstance(weight, bool) or not isinstance(weight, int | float):
      raise UserError(f'weight must be a number above 0, but got {weight!r}.')
    if not 0 < weight <= MAX_WEIGHT:
      raise UserError(f'weight must be above 0 and at most {MAX_WEIGHT:g}, but got {weight!r}.')
    if isinstance(self.tags, str) or not all(isinstance(tag, str) and tag for tag in self.tags):
      raise UserError(f'tags must be a list of names, but got {self.tags!r}.')
    object.__setattr__(self, 'tags', tuple(self.tags))


@dataclasses.dataclass(frozen=True)
class Constitution:
  """Principles and few-shot demonstrations.

  Attributes:
    principles: at least one, with distinct ids.
    demonstrations: dialogues, each a sequence of {'role', 'content'} messages. Requests and replies
      alternate; the first message is a request and the last is a reply.

  Raises:
    UserError: if there is no principle, an id occurs twice, or a demonstration is malformed.
  """

  principles: tuple[Principle, ...]
  demonstrations: tuple[tuple[dict[str, str], ...], ...] = ()

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
    """Return a hash of the whole content: 16 hex digits, the same on every machine."""
    content = json.dumps(dataclasses.asdict(self), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def load_constitution(config: ConstitutionConfig) -> Constitution:
  """Load a constitution and keep the selected principles, in the order of the file.

  Args:
    config: the path, tags and ids. A principle is kept if it passes both selections.

  Raises:
    UserError: if the file is missing or malformed, a tag or id matches no principle, or no
      principle remains. The message names the file, the principle and the allowed fields.
  """
  path = CONSTITUTIONS[config.path] if config.path in CONSTITUTIONS else config.path
  try:
    principles, demonstrations = _read_parts(path)
    constitution = Constitution(tuple(principles), tuple(demonstrations))
  except UserError as error:
    raise UserError(f'{path}: {error}') from error
  selected = _select(path, 'tags', constitution.principles, config.tags, lambda p: p.tags)
  selected = _select(path, 'ids', selected, config.ids, lambda p: (p.id,))
  return dataclasses.replace(constitution, principles=selected)


def draw_principles(
  constitution: Constitution, seed: int, prompt_id: str, rounds: int, replace: bool = True
) -> tuple[Principle, ...]:
  """Draw one principle per round for a prompt, in proportion to the principles' weights.

  The draw is a pure function of the arguments and the same on every machine. The first n of N
  rounds equal the draw for n rounds.

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
  remaining, drawn = list(principles), []
  for uniform in rng.random(rounds):
    cumulative = np.cumsum([principle.weight for principle in remaining])
    index = int(np.searchsorted(cumulative, uniform * cumulative[-1], side='right'))
    index = min(index, len(remaining) - 1)
    drawn.append(remaining[index])
    if not replace:
      del remaining[index]
  return tuple(drawn)


def _check_demonstration(index: int, dialogue: tuple[dict[str, str], ...]) -> None:
  """Raise UserError unless requests and replies alternate and every content is non-blank text."""
  where = f'Demonstration {index}'
  for i, message in enumerate(dialogue):
    if not isinstance(message, dict) or set(message) != {'role', 'content'}:
      raise UserError(
        f"{where}: message {i} must have the keys 'role' and 'content', but got {message!r}."
      )
    allowed = REPLY_ROLES if i % 2 else REQUEST_ROLES
    if message['role'] not in allowed:
      raise UserError(
        f'{where}: message {i} has the role {message["role"]!r}. Requests {REQUEST_ROLES} and '
        f'replies {REPLY_ROLES} must alternate, starting with a request.'
      )
    if not isinstance(message['content'], str) or not message['content'].strip():
      raise UserError(f'{where}: the content of message {i} must be non-blank text.')
  if not dialogue or len(dialogue) % 2:
    raise UserError(
      f'{where} must end with a reply {REPLY_ROLES}; it has {len(dialogue)} messages.'
    )


def _select(
  path: str,
  name: str,
  principles: Sequence[Principle],
  selection: Sequence[str],
  labels: Callable[[Principle], Iterable[str]],
) -> tuple[Principle, ...]:
  """Return the principles that have one of the selected labels; an empty selection keeps all."""
  if isinstance(selection, str):
    raise UserError(f'{name} must be a tuple of names, but got the text {selection!r}.')
  available = sorted({label for principle in principles for label in labels(principle)})
  unknown = [label for label in selection if label not in available]
  if unknown:
    raise UserError(f'{path}: no principle has the {name} {unknown}. Available are {available}.')
  if not selection:
    return tuple(principles)
  return tuple(p for p in principles if not set(selection).isdisjoint(labels(p)))


def _read_parts(path: str) -> tuple[list[Principle], Sequence[Any]]:
  """Return the principles and the demonstrations of a file or a published folder."""
  if os.path.isdir(path):
    instructions, few_shot = (os.path.join(path, name) for name in (_INSTRUCTIONS, _FEW_SHOT))
    if not os.path.isfile(instructions):
      raise UserError(f'the folder does not contain {_INSTRUCTIONS}.')
    demonstrations = _published_demonstrations(few_shot) if os.path.isfile(few_shot) else []
    return _published_principles(instructions), demonstrations
  if not os.path.isfile(path):
    raise UserError(
      f'there is no such constitution. Give one of {sorted(CONSTITUTIONS)}, a .yaml or .json '
      'file, or a folder.'
    )
  if path.endswith('.json'):
    return _published_principles(path), []
  if path.endswith(('.yaml', '.yml')):
    return _yaml_parts(path)
  raise UserError('a constitution must be a .yaml, .yml or .json file, or a folder.')


def _yaml_parts(path: str) -> tuple[list[Principle], list[Any]]:
  """Return the principles and the demonstrations of a YAML constitution."""
  document = _parse_file(path, _parse_yaml)
  fields = ('principles', 'demonstrations')
  if not isinstance(document, dict) or set(document) - set(fields) or 'principles' not in document:
    actual = sorted(map(str, document)) if isinstance(document, dict) else type(document).__name__
    raise UserError(
      "the file must be a mapping with 'principles' and, optionally, 'demonstrations', "
      f'but got {actual}.'
    )
  entries, demonstrations = (document.get(field, []) for field in fields)
  if not isinstance(entries, list):
    raise UserError(f"'principles' must be a list, but got {entries!r:.100}.")
  if not isinstance(demonstrations, list) or not all(isinstance(d, list) for d in demonstrations):
    raise UserError("'demonstrations' must be a list of lists of messages.")
  return [_yaml_principle(i, entry) for i, entry in enumerate(entries)], demonstrations


def _parse_yaml(text: str) -> Any:
  """Parse YAML, and raise an error for a repeated key, which `yaml.safe_load` would accept."""
  nodes = [yaml.compose(text, yaml.SafeLoader)]
  visited = set()  # an alias may point to a node that contains it
  while nodes:
    node = nodes.pop()
    if id(node) in visited:
      continue
    visited.add(id(node))
    if isinstance(node, yaml.SequenceNode):
      nodes += node.value
    elif isinstance(node, yaml.MappingNode):
      nodes += [value for _, value in node.value]
      keys = [key.value for key, _ in node.value]
      for i, (key, _) in enumerate(node.value):
        if key.value in keys[:i]:
          raise yaml.MarkedYAMLError(
            problem=f'the key {key.value!r} occurs twice', problem_mark=key.start_mark
          )
  return yaml.safe_load(text)


def _yaml_principle(index: int, entry: Any) -> Principle:
  """Return the principle of one YAML entry, with surrounding white space removed."""
  name = f' ({entry["id"]!r})' if isinstance(entry, dict) and 'id' in entry else ''
  where = f'principle {index}{name}'
  if not isinstance(entry, dict):
    raise UserError(f'{where} must be a mapping, but got {entry!r:.100}. {_FIELDS_HINT}')
  missing = [field for field in _REQUIRED_FIELDS if field not in entry]
  unknown = [field for field in entry if field not in _PRINCIPLE_FIELDS]
  if missing:
    raise UserError(f'{where} lacks the fields {missing}. {_FIELDS_HINT}')
  if unknown:
    raise UserError(f'{where} has the unknown fields {unknown}. {_FIELDS_HINT}')
  if not isinstance(entry.get('tags', []), list):
    raise UserError(f'{where}: tags must be a list of names, but got {entry["tags"]!r}.')
  stripped: dict[str, Any] = {
    name: v.strip() if isinstance(v, str) else v for name, v in entry.items()
  }
  try:
    return Principle(**stripped)
  except UserError as error:
    raise UserError(f'{where}: {error} {_FIELDS_HINT}') from error


def _published_principles(path: str) -> list[Principle]:
  """Return the principles of a published file, which maps ids to {prompt, edit_request}."""
  document = _parse_file(path, json.loads)
  if not isinstance(document, dict):
    raise UserError(f'the file must map ids to principles, but got a {type(document).__name__}.')
  principles = []
  for i, (name, entry) in enumerate(document.items()):
    where = f'principle {i} ({name!r})'
    if not isinstance(entry, dict) or set(entry) != {'prompt', 'edit_request'}:
      raise UserError(
        f"{where} must have the fields ['prompt', 'edit_request'], but got {entry!r:.200}."
      )
    prompt = entry['prompt']
    if isinstance(prompt, list) and all(isinstance(part, str) for part in prompt):
      prompt = ''.join(prompt)
    critique = _without_labels(f'{where}: prompt', prompt, 'critique_request', 'critique')
    revision = _without_labels(
      f'{where}: edit_request', entry['edit_request'], 'revision_request', 'revision'
    )
    try:
      principles.append(Principle(name, critique, revision))
    except UserError as error:
      raise UserError(f'{where}: {error}') from error
  return principles


def _without_labels(where: str, text: Any, request: str, reply: str) -> str:
  """Return the request between its own label and the label of the reply."""
  try:
    messages = split_plain(text) if isinstance(text, str) else []
  except UserError:
    messages = []
  if [m['role'] for m in messages] != [request, reply] or messages[1]['content'].strip():
    form = f'{LABELS[request]} ...{LABELS[reply]}'
    raise UserError(f'{where} must be text of the form {form!r}, but got {text!r:.200}.')
  return messages[0]['content'].strip()


def _published_demonstrations(path: str) -> list[tuple[dict[str, str], ...]]:
  """Return the dialogues of the published few-shot file, a list of plain texts.

  A text may end with the label of the next dialogue's first turn; this label is dropped.

  Raises:
    UserError: if joining the parsed messages does not reproduce a text.
  """
  texts = _parse_file(path, json.loads)
  if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
    raise UserError(f'{_FEW_SHOT} must be a list of texts.')
  dialogues = []
  for i, text in enumerate(texts):
    text = text.removesuffix(LABELS['user'])
    try:
      dialogue = tuple(split_plain(text))
    except UserError as error:
      raise UserError(f'{_FEW_SHOT}: demonstration {i}: {error}') from error
    if join_plain(dialogue) != text:
      raise UserError(
        f'{_FEW_SHOT}: demonstration {i} does not have one space after each label. Use the '
        'published file without changes.'
      )
    dialogues.append(dialogue)
  return dialogues


def _parse_file(path: str, parse: Callable[[str], Any]) -> Any:
  """Return the parsed content of a file; the parser's error message gives line and column."""
  try:
    with open(path, encoding='utf-8') as file:
      return parse(file.read())
  # PyYAML raises built-in errors for a value that its type does not allow, such as 2023-13-45.
  except (yaml.YAMLError, ValueError, KeyError, AttributeError, RecursionError) as error:
    raise UserError(f'{os.path.basename(path)} cannot be parsed: {error}') from error
