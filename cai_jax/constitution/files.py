"""Files of constitutions: YAML and JSON in our form, in Hugging Face's, and as published."""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import yaml

from cai_jax.constitution.principles import PRINCIPLE_FIELDS, REQUIRED_FIELDS, Principle
from cai_jax.constitution.safe_yaml import parse_yaml
from cai_jax.dialogue.plain import LABELS, join_plain, split_plain
from cai_jax.runtime.errors import UserError, show
from cai_jax.runtime.text_files import parse_json, read_text

MAX_SIZE = 2**20  # characters
FORM = (
  'A principle has the form {"id": "kind", "critique_request": "What is unkind?", '
  '"revision_request": "Be kind."}, in a list under "principles".'
)
_INSTRUCTIONS = 'CritiqueRevisionInstructions.json'
_FEW_SHOT = 'CritiqueRevisionFewShotPrompts.json'
_FIELDS_HINT = f'Allowed fields are {list(PRINCIPLE_FIELDS)}; the first three are required.'
_ANCHORS = ('x-', '_', '.')  # how keys begin that hold only anchors, as in other YAML tools
_LABEL = re.compile(
  r'\s*(?:Critique|Revision) ?Request:|.*\n(?:Critique|Revision):\s*\Z', re.DOTALL
)
_ONE_CHAIN = ('user', 'assistant', 'critique_request', 'critique', 'revision_request', 'revision')

Parts = tuple[list[Principle], Sequence[Any]]  # principles and demonstrations


def read_constitution(path: str, names: Sequence[str] = ()) -> Parts:
  """Return the principles and the demonstrations of a file or a published folder.

  Args:
    path: the file or folder.
    names: names of constitutions, for the error message.

  Raises:
    UserError: if the file is missing or malformed.
  """
  if os.path.isdir(path):
    instructions, few_shot = (os.path.join(path, name) for name in (_INSTRUCTIONS, _FEW_SHOT))
    if not os.path.isfile(instructions):
      raise UserError(f'the folder does not contain {_INSTRUCTIONS}.')
    demonstrations = _published_demonstrations(few_shot) if os.path.isfile(few_shot) else []
    return _json_parts(instructions)[0], demonstrations
  if not os.path.exists(path):
    raise UserError(
      f'there is no such constitution. Give one of {list(names)}, a .yaml, .json or .md file, or '
      'a folder.'
    )
  suffix = os.path.splitext(path)[1].lower()
  if suffix == '.json':
    return _json_parts(path)
  if suffix in ('.yaml', '.yml'):
    return _parts(_parse_file(path, parse_yaml))
  raise UserError('a constitution must be a .yaml, .yml, .json or .md file, or a folder.')


def _json_parts(path: str) -> Parts:
  """Return the parts of a JSON file; unlike YAML, it may have the published form."""
  document = _parse_file(path, parse_json)
  if not isinstance(document, dict):
    raise UserError(
      f'the file must map ids to principles, but got a {type(document).__name__}. {FORM}'
    )
  if 'principles' in document or 'constitutions' in document:
    return _parts(document)
  return _published_principles(document), []


def _parts(document: Any) -> Parts:
  """Return the parts of a document in our form or in that of Hugging Face's recipe."""
  if isinstance(document, dict) and 'constitutions' in document:
    return _recipe_parts(document)
  if isinstance(document, dict):
    document = {k: v for k, v in document.items() if not str(k).startswith(_ANCHORS)}
  fields = ('principles', 'demonstrations')
  if not isinstance(document, dict) or set(document) - set(fields) or 'principles' not in document:
    actual = sorted(map(str, document)) if isinstance(document, dict) else type(document).__name__
    raise UserError(
      "the file must be a mapping with 'principles' and, optionally, 'demonstrations', "
      f'but got {show(actual)}. Keys for anchors only may begin with "x-". {FORM}'
    )
  entries, demonstrations = (document.get(field) for field in fields)
  demonstrations = [] if demonstrations is None else demonstrations
  if not isinstance(entries, list):
    raise UserError(f"'principles' must be a list, but got {show(entries)}. {FORM}")
  if not isinstance(demonstrations, list) or not all(isinstance(d, list) for d in demonstrations):
    raise UserError("'demonstrations' must be a list of lists of messages.")
  return [_principle(i, entry) for i, entry in enumerate(entries)], demonstrations


def _principle(index: int, entry: Any) -> Principle:
  """Return the principle of one entry, with surrounding white space removed."""
  name = f' ({show(entry["id"])})' if isinstance(entry, dict) and 'id' in entry else ''
  where = f'principle {index}{name}'
  if not isinstance(entry, dict):
    raise UserError(f'{where} must be a mapping, but got {show(entry)}. {FORM}')
  missing = [field for field in REQUIRED_FIELDS if field not in entry]
  unknown = [field for field in entry if field not in PRINCIPLE_FIELDS]
  if missing:
    raise UserError(f'{where} lacks the fields {missing}. {_FIELDS_HINT} {FORM}')
  if unknown:
    raise UserError(f'{where} has the unknown fields {show(unknown)}. {_FIELDS_HINT}')
  if not isinstance(entry.get('tags', []), list):
    raise UserError(f'{where}: tags must be a list of names, but got {show(entry["tags"])}.')
  if entry.get('comparison_request', 'x') in ('', None):
    raise UserError(f'{where}: comparison_request is blank. Leave it out, or write a request.')
  for field in REQUIRED_FIELDS[1:]:
    if isinstance(entry[field], str) and _LABEL.match(entry[field]):
      raise UserError(
        f'{where}: {field} contains a label: {show(entry[field], 200)}. Remove the labels, which '
        'are added when a dialogue is written, or use the published form.'
      )
  stripped: dict[str, Any] = {
    name: v.strip() if isinstance(v, str) else v for name, v in entry.items()
  }
  try:
    return Principle(**stripped)
  except UserError as error:
    raise UserError(f'{where}: {error} {_FIELDS_HINT}') from error


def _recipe_parts(document: dict[str, Any]) -> Parts:
  """Return the parts of a file in the form of Hugging Face's Constitutional AI recipe.

  Its principles have no ids, so they are called principle_0, principle_1 and so on. A few-shot
  dialogue of six messages is a whole chain: response, critique and revision.
  """
  unknown = [name for name in document if name not in ('constitutions', 'system_chat')]
  entries, dialogues = document['constitutions'], document.get('system_chat', [])
  if unknown or not isinstance(entries, list) or not isinstance(dialogues, list):
    raise UserError(
      "the file must have a list 'constitutions' and, optionally, a list 'system_chat', but got "
      f'{show(document)}. {FORM}'
    )
  principles = []
  for i, entry in enumerate(entries):
    if not isinstance(entry, dict) or set(entry) != {'critic', 'revision'}:
      raise UserError(
        f"principle {i} must have the fields ['critic', 'revision'], but got {show(entry)}."
      )
    requests = {'critique_request': entry['critic'], 'revision_request': entry['revision']}
    principles.append(_principle(i, {'id': f'principle_{i}', **requests}))
  if dialogues and all(isinstance(message, dict) for message in dialogues):
    dialogues = [dialogues]
  if not all(isinstance(dialogue, list) for dialogue in dialogues):
    raise UserError("'system_chat' must be a list of lists of messages.")
  return principles, [_with_chain_roles(dialogue) for dialogue in dialogues]


def _with_chain_roles(dialogue: list[Any]) -> list[Any]:
  """Name the roles of a dialogue that is a whole chain; its messages alternate."""
  roles = [message.get('role') if isinstance(message, dict) else None for message in dialogue]
  if roles != ['user', 'assistant'] * 3:
    return dialogue
  return [{**message, 'role': role} for message, role in zip(dialogue, _ONE_CHAIN, strict=True)]


def _published_principles(document: dict[str, Any]) -> list[Principle]:
  """Return the principles of a published document, which maps ids to {prompt, edit_request}."""
  principles = []
  for i, (name, entry) in enumerate(document.items()):
    where = f'principle {i} ({show(name)})'
    if not isinstance(entry, dict) or set(entry) != {'prompt', 'edit_request'}:
      raise UserError(
        f"{where} must have the fields ['prompt', 'edit_request'], but got "
        f'{show(entry, 200)}. {FORM}'
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
    raise UserError(f'{where} must be text of the form {form!r}, but got {show(text, 200)}.')
  return messages[0]['content'].strip()


def _published_demonstrations(path: str) -> list[tuple[dict[str, str], ...]]:
  """Return the dialogues of the published few-shot file, a list of plain texts.

  A text may end with the label of the next dialogue's first turn; this label is dropped.

  Raises:
    UserError: if joining the parsed messages does not reproduce a text.
  """
  texts = _parse_file(path, parse_json)
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
  text = read_text(path, MAX_SIZE)
  try:
    return parse(text)
  # PyYAML raises built-in errors for a value that its type does not allow, such as 2023-13-45.
  except (
    yaml.YAMLError,
    ValueError,
    KeyError,
    AttributeError,
    OverflowError,
    RecursionError,
  ) as error:
    raise UserError(f'{os.path.basename(path)} cannot be parsed: {error}') from error
