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
Feedback" (repository anthropics/ConstitutionalHarmlessnessPaper): its file
CritiqueRevisionInstructions.json, or a folder that holds it and maybe
CritiqueRevisionFewShotPrompts.json.
"""

import dataclasses
import hashlib
import json
import os

import numpy as np
import yaml

from cai_jax.dialogue.plain import LABELS, REPLY_ROLES, REQUEST_ROLES, join_plain, split_plain
from cai_jax.runtime.errors import UserError

GENERAL = os.path.join(os.path.dirname(__file__), 'constitution.yaml')  # the one shipped


_INSTRUCTIONS = 'CritiqueRevisionInstructions.json'
MAX_WEIGHT = 1e100  # so that sums of weights stay finite
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
        raise UserError(f'{name} must be a text that is not blank, got {value!r}')
      if any('\ud800' <= character <= '\udfff' for character in value):
        raise UserError(f'{name} holds half a surrogate pair: {value!r}')
    weight = self.weight
    if isinstance(weight, bool) or not isinstance(weight, int | float):
      raise UserError(f'weight must be a number above 0, got {weight!r}')
    if not 0 < weight <= MAX_WEIGHT:
      raise UserError(f'weight must be a finite number above 0, up to 1e100, got {weight!r}')
    if isinstance(self.tags, str) or not all(isinstance(tag, str) and tag for tag in self.tags):
      raise UserError(f'tags must be a list of names, got {self.tags!r}')
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
      raise UserError('a constitution needs at least one principle, got none')
    first = {}
    for i, principle in enumerate(self.principles):
      if principle.id in first:
        raise UserError(
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
      raise UserError(f"{where}: message {i} needs the keys 'role' and 'content', got {message!r}")
    allowed = REPLY_ROLES if i % 2 else REQUEST_ROLES
    if message['role'] not in allowed:
      raise UserError(
        f'{where}: message {i} has the role {message["role"]!r}; requests {REQUEST_ROLES} and '
        f'replies {REPLY_ROLES} take turns, a request first'
      )
    if not isinstance(message['content'], str) or not message['content'].strip():
      raise UserError(f'{where}: message {i} needs a text that is not blank as its content')
  if not dialogue or len(dialogue) % 2:
    raise UserError(f'{where} must end with a reply {REPLY_ROLES}; it has {len(dialogue)} messages')


def load(
  path: str | os.PathLike, tags: tuple[str, ...] = (), ids: tuple[str, ...] = ()
) -> Constitution:
  """Returns the constitution in a YAML file, or in the published JSON form (file or folder).

  Args:
    path: a .yaml or .yml file; a .json file of instructions; a folder of the published files.
    tags: keep only principles with at least one of these tags; () keeps all.
    ids: keep, of those, only principles with these ids, in the file's order; () keeps all.

  Raises:
    ValueError: no such file, not readable as what its name says, a field that is missing, unknown
      or of the wrong kind, a repeated id, or no principle left. The message names the file, the
      principle and the fields allowed.
  """
  path = os.fspath(path)
  if os.path.isdir(path):
    instructions, few_shot = (os.path.join(path, name) for name in (_INSTRUCTIONS, _FEW_SHOT))
    if not os.path.isfile(instructions):
      raise UserError(f'{path}: the folder holds no {_INSTRUCTIONS}')
    demonstrations = _published_demonstrations(few_shot) if os.path.isfile(few_shot) else ()
    principles = _published_principles(instructions)
    return _constitution(instructions, principles, demonstrations, tags, ids)
  if not os.path.isfile(path):
    raise UserError(f'{path}: no such constitution; give a .yaml or .json file, or a folder')
  if path.endswith('.json'):
    return _constitution(path, _published_principles(path), (), tags, ids)
  if path.endswith(('.yaml', '.yml')):
    return _constitution(path, *_yaml_parts(path), tags, ids)
  raise UserError(f'{path}: a constitution is a .yaml, .yml or .json file, or a folder')


def draw(
  constitution: Constitution, seed: int, prompt_id: str, rounds: int, replace: bool = True
) -> tuple[Principle, ...]:
  """Returns the principles of a prompt's `rounds` rounds, by weight.

  A pure function of its arguments, the same on every machine; the first n of N rounds are the
  draw for n rounds. With `replace` the rounds are independent; without it no principle comes
  twice, each being drawn by weight from those left.

  Raises:
    ValueError: negative rounds, or more rounds than principles without `replace`.
  """
  principles = constitution.principles
  if rounds < 0:
    raise UserError(f'rounds must be 0 or more, got {rounds}')
  if not replace and rounds > len(principles):
    raise UserError(
      f'{rounds} rounds without repetition need as many principles, and the constitution has '
      f'{len(principles)}: use fewer rounds, more principles, or draw with replace=True'
    )
  digest = hashlib.sha256(json.dumps([int(seed), prompt_id]).encode()).digest()
  rng = np.random.default_rng(np.frombuffer(digest, '<u4'))
  left, drawn = list(principles), []
  for u in rng.random(rounds):
    chances = np.cumsum([principle.weight for principle in left])
    at = min(int(np.searchsorted(chances, u * chances[-1], side='right')), len(left) - 1)
    drawn.append(left[at])
    if not replace:
      del left[at]
  return tuple(drawn)


def _constitution(path, principles, demonstrations, tags, ids) -> Constitution:
  """Returns the checked constitution of the principles with any of `tags` and one of `ids`."""
  try:
    whole = Constitution(tuple(principles), tuple(demonstrations))
  except ValueError as error:
    raise UserError(f'{path}: {error}') from error
  kept = whole.principles
  for name, wanted, of in (
    ('tags', tags, lambda principle: principle.tags),
    ('ids', ids, lambda principle: (principle.id,)),
  ):
    if isinstance(wanted, str):
      raise UserError(f'{name} must be a tuple of names, got the text {wanted!r}')
    known = sorted({given for principle in kept for given in of(principle)})
    unknown = [given for given in wanted if given not in known]
    if unknown:
      raise UserError(f'{path}: no principle has the {name} {unknown}; there are {known}')
    if wanted:
      kept = tuple(principle for principle in kept if set(of(principle)) & set(wanted))
  return dataclasses.replace(whole, principles=kept)


def _parse_yaml(file):
  """Returns the document; a key given twice, which the parser would let pass, is an error too."""
  text = file.read()
  nodes = [yaml.compose(text, yaml.SafeLoader)]
  seen = set()  # an alias may lead back to where it stands
  while nodes:
    node = nodes.pop()
    if id(node) in seen:
      continue
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
      nodes += node.value
    elif isinstance(node, yaml.MappingNode):
      nodes += [value for _, value in node.value]
      keys = [key.value for key, _ in node.value]
      for i, (key, _) in enumerate(node.value):
        if key.value in keys[:i]:
          raise yaml.MarkedYAMLError(
            problem=f'the key {key.value!r} twice', problem_mark=key.start_mark
          )
  return yaml.safe_load(text)


def _yaml_parts(path: str) -> tuple[list[Principle], list]:
  """Returns the principles and the demonstrations of a YAML constitution."""
  document = _read(path, _parse_yaml, yaml.YAMLError)
  fields = ('principles', 'demonstrations')
  if not isinstance(document, dict) or set(document) - set(fields) or 'principles' not in document:
    found = sorted(map(str, document)) if isinstance(document, dict) else type(document).__name__
    raise UserError(
      f"{path}: must be a mapping with 'principles' and, if wanted, 'demonstrations'; found {found}"
    )
  entries, demonstrations = (document.get(field, []) for field in fields)
  if not isinstance(entries, list):
    raise UserError(f"{path}: 'principles' must be a list, got {entries!r:.100}")
  if not isinstance(demonstrations, list) or not all(isinstance(d, list) for d in demonstrations):
    raise UserError(f"{path}: 'demonstrations' must be a list of lists of messages")
  return [_yaml_principle(path, i, entry) for i, entry in enumerate(entries)], demonstrations


def _yaml_principle(path: str, index: int, entry) -> Principle:
  name = f' ({entry["id"]!r})' if isinstance(entry, dict) and 'id' in entry else ''
  where = f'{path}: principle {index}{name}'
  allowed = f'the fields are {list(_PRINCIPLE_FIELDS)}, of which the first three are needed'
  if not isinstance(entry, dict):
    raise UserError(f'{where} must be a mapping, got {entry!r:.100}; {allowed}')
  missing = [field for field in _PRINCIPLE_FIELDS[:3] if field not in entry]
  unknown = [field for field in entry if field not in _PRINCIPLE_FIELDS]
  if missing or unknown:
    problems = [f'lacks {missing}'] * bool(missing) + [f'has unknown {unknown}'] * bool(unknown)
    raise UserError(f'{where} {" and ".join(problems)}; {allowed}')
  if not isinstance(entry.get('tags', []), list):
    raise UserError(f'{where}: tags must be a list of names, got {entry["tags"]!r}')
  stripped = {field: v.strip() if _is_text(v) else v for field, v in entry.items()}
  try:
    return Principle(**stripped)
  except ValueError as error:
    raise UserError(f'{where}: {error}; {allowed}') from error


def _published_principles(path: str) -> list[Principle]:
  """Returns the principles of a published instructions file: id -> {prompt, edit_request}."""
  document = _read(path, json.load, json.JSONDecodeError)
  if not isinstance(document, dict):
    raise UserError(
      f'{path}: must be an object of principles by id, got a {type(document).__name__}'
    )
  principles = []
  for i, (name, entry) in enumerate(document.items()):
    where = f'{path}: principle {i} ({name!r})'
    if not isinstance(entry, dict) or set(entry) != {'prompt', 'edit_request'}:
      raise UserError(
        f"{where} must have the fields ['prompt', 'edit_request'], got {entry!r:.200}"
      )
    prompt = entry['prompt']
    prompt = ''.join(prompt) if isinstance(prompt, list) and all(map(_is_text, prompt)) else prompt
    critique = _unmarked(f'{where}: prompt', prompt, 'critique_request', 'critique')
    revision = _unmarked(
      f'{where}: edit_request', entry['edit_request'], 'revision_request', 'revision'
    )
    try:
      principles.append(Principle(name, critique, revision))
    except ValueError as error:
      raise UserError(f'{where}: {error}') from error
  return principles


def _unmarked(where: str, text, request: str, reply: str) -> str:
  """Returns the request between its own label and the label of the reply that it asks for."""
  form = f'{LABELS[request]} ...{LABELS[reply]}'
  try:
    messages = split_plain(text) if _is_text(text) else []
  except ValueError:
    messages = []
  if [m['role'] for m in messages] != [request, reply] or messages[1]['content'].strip():
    raise UserError(f'{where} must be a text of the form {form!r}, got {text!r:.200}')
  return messages[0]['content'].strip()


def _published_demonstrations(path: str) -> list[tuple[dict[str, str], ...]]:
  """Returns the dialogues of the published few-shot file, a list of plain texts.

  A text may end with the label of the next dialogue's first turn, which is left out.

  Raises:
    ValueError: a text whose messages, joined again, do not give the text.
  """
  texts = _read(path, json.load, json.JSONDecodeError)
  if not isinstance(texts, list) or not all(map(_is_text, texts)):
    raise UserError(f'{path}: must be a list of texts')
  dialogues = []
  for i, text in enumerate(texts):
    text = text.removesuffix(LABELS['user'])
    try:
      dialogue = tuple(split_plain(text))
    except ValueError as error:
      raise UserError(f'{path}: demonstration {i}: {error}') from error
    if join_plain(dialogue) != text:
      raise UserError(f'{path}: demonstration {i} does not have one space after each label')
    dialogues.append(dialogue)
  return dialogues


def _is_text(value) -> bool:
  return isinstance(value, str)


def _read(path: str, parse, syntax_error):
  """Returns the parsed file; a parser's error tells its line and column in its own text."""
  try:
    with open(path, encoding='utf-8') as file:
      return parse(file)
  except (syntax_error, UnicodeDecodeError) as error:
    raise UserError(f'{path}: not readable: {error}') from error
