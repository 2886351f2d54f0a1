"""Prompts: dialogues that end with the human's turn, from files, TFDS datasets and the hub.

One row, whatever it was read from, gives its dialogue in one of these fields (the first present):

  messages  [{"role": ..., "content": ...}, ...] ending with the user's turn
  prompt    the user's text, or such a list (TRL's conversational form)
  chosen    a dialogue with its answer (HH-RLHF); the prompt is everything before the last answer

A text that begins with the label "\\n\\nHuman:" is a plain dialogue, as HH-RLHF prints them; a
generation prompt "\\n\\nAssistant:" at its end is no turn of it. Optional fields of a row are `id`
(without it the id is a hash of the dialogue) and `metadata` (an object of texts). Other fields are
read only when named.
"""

import collections
import dataclasses
import gzip
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from cai_jax.dialogue.plain import LABELS, split_plain
from cai_jax.runtime.errors import UserError

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
    if not _is_text(self.id) or not self.id or not self.id.isprintable():
      raise UserError(f'a prompt id must be a printable text that is not empty, got {self.id!r}')
    object.__setattr__(self, 'messages', tuple(self.messages))
    _check_messages(self.messages)
    strange = {k: v for k, v in self.metadata.items() if not isinstance(v, str)}
    if strange:
      raise UserError(f'prompt metadata must be texts, got {strange!r}: make them texts')


def _check_messages(messages: tuple[dict[str, str], ...]) -> None:
  """Raises ValueError unless `messages` is a dialogue that waits for the assistant."""
  for i, message in enumerate(messages):
    if not isinstance(message, dict) or set(message) != {'role', 'content'}:
      raise UserError(
        f"message {i} must be an object with the keys 'role' and 'content', got {message!r}"
      )
    if message['role'] not in ROLES:
      raise UserError(f'message {i} has the role {message["role"]!r}; allowed are {ROLES}')
    if not _is_text(message['content']) or not message['content'].strip():
      raise UserError(
        f'message {i} ({message["role"]}) needs a text that is not blank as its content, '
        f'got {message["content"]!r}'
      )
    if any('\ud800' <= character <= '\udfff' for character in message['content']):
      raise UserError(f'message {i} ({message["role"]}) holds half a surrogate pair')
  roles = [message['role'] for message in messages]
  turns = roles[1:] if roles[:1] == ['system'] else roles
  if len(turns) % 2 == 0 or turns != (['user', 'assistant'] * len(turns))[: len(turns)]:
    raise UserError(
      f'a prompt must be an optional system message, then user and assistant in turn, the user '
      f"first and last (a dialogue with its answer belongs in the field 'chosen'); "
      f'got the roles {roles}'
    )


def load(
  source: str,
  name: str = '',
  split: str = 'train',
  field: str = '',
  limit: int = -1,
  subset: str = '',
  metadata_fields: Sequence[str] = (),
  shuffle_seed: int | None = None,
) -> list[Prompt]:
  """Returns the prompts of a source, every row of it checked; ids are unique.

  Args:
    source: a .jsonl file (one row a line) or a .txt file (one prompt a line), either gzipped if
      .gz follows; 'tfds' for a TFDS dataset in ArrayRecord files; 'hub' for what
      `datasets.load_dataset` takes. Blank lines of a file are no rows.
    name: of the 'tfds' or 'hub' dataset, or its folder.
    split: of the dataset.
    field: the field that holds the dialogue; '' takes the first of messages, prompt, chosen.
    limit: the most prompts to return; -1 for all.
    subset: the configuration's name of a 'hub' dataset, if it has several.
    metadata_fields: further fields of a row to keep, as texts, in the metadata.
    shuffle_seed: shuffles before the limit; the order depends on the seed and the ids alone.

  Rows with one content and no ids are told apart by '-1', '-2', ... after the hash.

  Raises:
    ValueError: a missing or empty source, a row that is no prompt (with its line), an id that is
      given twice, or an argument that the source has no use for.
  """
  if limit != -1 and limit < 1:
    raise UserError(f'limit must be 1 or more, or -1 for all, got {limit}')
  is_dataset = source in ('tfds', 'hub')
  if is_dataset != bool(name):
    raise UserError(
      f"name is for the sources 'tfds' and 'hub', which need it; "
      f'got source={source!r}, name={name!r}'
    )
  if subset and source != 'hub':
    raise UserError(f"subset={subset!r} has a meaning for source='hub' only, got {source!r}")
  if source == 'tfds':
    rows = _read_tfds(name, split)
  elif source == 'hub':
    rows = _read_hub(name, split, subset)
  else:
    rows = _read_file(source)
  prompts = _unique([_prompt(place, row, field, metadata_fields) for place, row in rows])
  if not prompts:
    raise UserError(f'{name or source}: holds no prompt; it needs at least one. {_FORM}')
  if shuffle_seed is not None:
    prompts.sort(key=lambda prompt: (_hash([shuffle_seed, prompt.id]), prompt.id))
  return prompts if limit == -1 else prompts[:limit]


def check_disjoint(
  training: Iterable[Prompt],
  evaluation: Iterable[Prompt],
  names: tuple[str, str] = ('training', 'evaluation'),
) -> None:
  """Raises ValueError with examples if a dialogue is in both, whatever its case and white space."""
  seen = {_normal_form(prompt): prompt.id for prompt in training}
  shared = [(seen[form], p) for p in evaluation if (form := _normal_form(p)) in seen]
  if shared:
    examples = '; '.join(
      f'{names[0]} {first!r} is {names[1]} {prompt.id!r}: {prompt.messages[-1]["content"]!r:.80}'
      for first, prompt in shared[:3]
    )
    raise UserError(
      f'{len(shared)} of the {names[1]} prompts are among the {names[0]} prompts: {examples}. '
      f'Take them out of one of the two'
    )


def _normal_form(prompt: Prompt) -> str:
  turns = [[m['role'], ' '.join(m['content'].casefold().split())] for m in prompt.messages]
  return json.dumps(turns)


def _hash(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


# Reading: each gives (place, row), the place naming the source and the line or row for errors.

_FORM = (
  'A row has its dialogue as {"messages": [{"role": .., "content": ..}, ..]}, {"prompt": text or '
  'messages} or {"chosen": dialogue with its answer}; "id" and "metadata" are optional'
)


def _lines(path: str) -> Iterator[tuple[str, str]]:
  """Yields (place, line) of the lines that are not blank."""
  if not os.path.isfile(path):
    raise UserError(f'{path}: no such file')
  number = 0
  try:
    with gzip.open(path) if path.endswith('.gz') else open(path, 'rb') as file:
      for number, line in enumerate(file, 1):
        text = line.decode('utf-8-sig' if number == 1 else 'utf-8').strip()
        if text:
          yield f'{path}, line {number}', text
  except UnicodeDecodeError as error:
    raise UserError(f'{path}, line {number}: not UTF-8 text: {error}') from error
  except (EOFError, gzip.BadGzipFile) as error:
    raise UserError(f'{path}, after line {number}: a broken gzip file: {error}') from error


def _read_file(path: str) -> Iterator[tuple[str, Any]]:
  name = path.removesuffix('.gz')
  if not name.endswith(('.jsonl', '.txt')):
    raise UserError(
      f"{path}: prompts come from a .jsonl or .txt file (or .gz of one), from 'tfds' or from 'hub'"
    )
  for place, line in _lines(path):
    if name.endswith('.txt'):
      yield place, {'prompt': line}
      continue
    try:
      yield place, json.loads(line)
    except (ValueError, RecursionError) as error:
      raise UserError(f'{place}: not JSON ({error}), found {line!r:.80}. {_FORM}') from error


def _read_tfds(source: str, split: str) -> Iterator[tuple[str, Any]]:
  import tensorflow_datasets as tfds  # here, because it takes seconds and most runs do not need it

  try:
    if os.path.isdir(source):
      rows = tfds.builder_from_directory(source).as_data_source(split)
    else:
      rows = tfds.data_source(source, split=split)
  except Exception as error:  # its own kinds of errors are many and not public
    raise UserError(
      f'{source}: TFDS cannot read split {split!r} of it: {error!s:.300}. Give the folder that '
      f'holds dataset_info.json, or the name of a dataset'
    ) from error
  for i in range(len(rows)):
    yield f'{source}, split {split!r}, row {i}', _without_arrays(rows[i])


def _read_hub(source: str, split: str, subset: str) -> Iterator[tuple[str, Any]]:
  import datasets  # here, because it takes seconds and most runs do not need it

  try:
    rows = datasets.load_dataset(source, subset or None, split=split)
  except Exception as error:  # network, hub, builder and file errors share no public base
    raise UserError(
      f'{source}: `datasets` cannot load split {split!r}, subset {subset!r} of it: {error!s:.300}'
    ) from error
  for i, row in enumerate(rows):
    yield f'{source}, split {split!r}, row {i}', row


def _without_arrays(value: Any) -> Any:
  """Returns a row of TFDS in plain Python: bytes as text, arrays as lists, columns as rows."""
  if isinstance(value, bytes):
    return value.decode()
  if isinstance(value, np.ndarray | list | tuple):
    return [_without_arrays(item) for item in value]
  if isinstance(value, np.generic):
    return value.item()
  if not isinstance(value, dict):
    return value
  value = {key: _without_arrays(item) for key, item in value.items()}
  if set(value) == {'role', 'content'} and all(isinstance(v, list) for v in value.values()):
    columns = zip(value['role'], value['content'], strict=True)  # TFDS's form of a list of dicts
    return [{'role': role, 'content': content} for role, content in columns]
  return value


# From a row to a prompt.


def _prompt(
  place: str, row: Any, field: str, metadata_fields: Sequence[str]
) -> tuple[str, Prompt, bool]:
  """Returns (place, prompt, whether the row gives its id)."""
  try:
    if not isinstance(row, dict):
      raise UserError(f'a row must be an object, got a {type(row).__name__}')
    wanted = [field] if field else ['messages', 'prompt', 'chosen']
    found = next((name for name in wanted if name in row), None)
    if found is None:
      raise UserError(f'none of the fields {wanted} is in the row, which has {list(row)}')
    messages = _messages(row[found], has_answer=found in ('chosen', 'rejected'))
    identity = _identity(row) if 'id' in row else _hash(messages)
    return place, Prompt(identity, messages, _metadata(row, metadata_fields)), 'id' in row
  except ValueError as error:
    raise UserError(f'{place}: {error}. Found {row!r:.120}. {_FORM}') from error


def _identity(row: dict[str, Any]) -> str:
  if isinstance(row['id'], bool) or not isinstance(row['id'], str | int) or row['id'] == '':
    raise UserError(f'an id must be a text that is not empty, or an integer, got {row["id"]!r}')
  return str(row['id'])


def _metadata(row: dict[str, Any], fields: Sequence[str]) -> dict[str, str]:
  metadata = row.get('metadata', {})
  if _is_text(metadata):  # as D_CAI and other flat tables keep it
    try:
      metadata = json.loads(metadata)
    except json.JSONDecodeError as error:
      raise UserError(f'metadata must be an object, or JSON text of one: {error}') from error
  if not isinstance(metadata, dict):
    raise UserError(f'metadata must be an object of texts, got {metadata!r:.80}')
  missing = [name for name in fields if name not in row]
  if missing:
    raise UserError(f'the metadata fields {missing} are not in the row, which has {list(row)}')
  return metadata | {name: str(row[name]) for name in fields}


def _messages(value: Any, has_answer: bool) -> list[dict[str, str]]:
  """Returns the messages of a dialogue given as a text or a list, without its last answer."""
  if _is_text(value) and (has_answer or value.startswith(LABELS['user'])):
    messages = parse_dialogue(value)
  elif _is_text(value):
    messages = [{'role': 'user', 'content': value}]
  elif isinstance(value, list):
    messages = value
  else:
    raise UserError(f'a dialogue must be a text or a list of messages, got {value!r:.80}')
  if not has_answer:
    is_open = _is_text(value) and messages[-1] == {'role': 'assistant', 'content': ''}
    return messages[:-1] if is_open else messages  # without the label of a generation prompt
  last = messages[-1] if messages else None
  if not isinstance(last, dict) or last.get('role') != 'assistant':
    raise UserError(f'a dialogue with its answer must end with the assistant, it has {last!r:.80}')
  return messages[:-1]


def parse_dialogue(text: str) -> list[dict[str, str]]:
  """Returns the messages of a plain dialogue, as HH-RLHF prints it.

  Only "\\n\\nHuman:" and "\\n\\nAssistant:" are labels. Where one speaker's label comes twice in a
  row, as it does in some published rows, the two turns are joined by an empty line.

  Raises:
    ValueError: the text does not begin with a label.
  """
  turns = split_plain(text, ('user', 'assistant'))
  messages = []
  for role, group in itertools.groupby(turns, key=lambda turn: turn['role']):
    messages.append({'role': role, 'content': '\n\n'.join(turn['content'] for turn in group)})
  return messages


def _unique(rows: Sequence[tuple[str, Prompt, bool]]) -> list[Prompt]:
  """Returns the prompts with unique ids; an id that two rows give is an error."""
  places: dict[str, str] = {}
  for place, prompt, given in rows:
    if given and prompt.id in places:
      raise UserError(
        f'{place}: the id {prompt.id!r} is already given at {places[prompt.id]}; '
        f'give each row its own'
      )
    if given:
      places[prompt.id] = place
  copies = collections.Counter()
  prompts = []
  for place, prompt, given in rows:
    if not given:
      identity = prompt.id
      if copies[identity]:
        prompt = dataclasses.replace(prompt, id=f'{identity}-{copies[identity]}')
      copies[identity] += 1
      if prompt.id in places:
        raise UserError(
          f'{place}: its dialogue hashes to the id given at {places[prompt.id]}; change that id'
        )
    prompts.append(prompt)
  return prompts


def _is_text(value: Any) -> bool:
  return isinstance(value, str)
