"""Sources of prompts: files, TFDS datasets, the Hugging Face hub, and sources that users register.

The folder sets/ has the published sets, which are sources with names of their own.

A source is a function that yields rows. To add one, register it under a name, which users then set
as `prompts.*.source`. To read a new file format, register it under the suffix of its files:

  @SOURCES.register('.list')
  def read_list(source: PromptSource, seed: int) -> Iterator[Row]:
    for number, line in read_lines(source.source):
      yield f'{source.source}, line {number}', {'prompt': line}

The module prompt_files.py has the built-in file formats, prompts.py explains what a row contains,
and row_form.py reads it.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import numpy as np

from cai_jax.data.dialogues import ROLES
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.registry import Registry
from cai_jax.runtime.settings import setting

# (place, row): the place names the source and the line or row, for error messages.
Row = tuple[str, Any]

# Fields of a row that can hold its dialogue.
MESSAGE_FIELDS = ('messages', 'conversations', 'conversation')
DIALOGUE_FIELDS = (*MESSAGE_FIELDS, 'prompt', 'chosen')

ROW_FORM = (
  'A row needs {"messages": [{"role": "user", "content": "Hi"}, ..]}, {"prompt": text or messages} '
  'or {"chosen": dialogue with its answer}; "id" and "metadata" are optional.'
)


@dataclasses.dataclass(frozen=True)
class PromptSource:
  """Where a set of prompts comes from.

  Raises:
    UserError: if the limit of a source is out of range.
  """

  source: str = setting(
    '',
    'A file: .jsonl (one row per line), .json (an array of rows), .csv, .tsv, .parquet or .txt '
    '(one prompt per line), also compressed with gzip. Or the name of a published set, such as '
    "'xstest' (docs/prompts.md), or 'tfds', 'hub' or 'tiny'. '' means no prompts.",
    path=True,
  )
  name: str = setting(
    '',
    "Name or folder of the TFDS or hub dataset. For the source 'tiny': 'baited' or 'benign'.",
    path=True,
  )
  subset: str = setting('', 'Configuration of the hub dataset, if it has several.')
  split: str = setting(
    'train',
    "Split of the dataset. For the source 'tiny': 'train' or 'eval'. A published set without a "
    "split of that name reads its first split for 'train'.",
  )
  field: str = setting(
    '', "Field that contains the prompt. '' means messages, conversations, prompt or chosen."
  )
  limit: int = setting(-1, 'Maximum number of prompts to load. -1 loads all.')
  shuffle: bool = setting(False, "Shuffle with the run's seed before applying the limit.")
  drop_answer: bool = setting(
    False,
    'Leave out the answer of dialogues that end with one. Without it, such a dialogue is an error, '
    "except in the field 'chosen', which always ends with an answer.",
    added=True,
  )
  metadata_fields: tuple[str, ...] = setting(
    (), 'Further fields of a row to store in the metadata of the prompt, as text.'
  )

  path: str = setting(
    '',
    'Local copy of the published set that `source` names: a file, a folder that `datasets` saved, '
    "or a folder with the files of its hub repository. '' loads the set from the hub.",
    added=True,
    path=True,
  )
  mixture: tuple[str, ...] = setting(
    (),
    "Sources to draw from, as 'NAME:WEIGHT', 'NAME/SPLIT=COPY:WEIGHT' or 'FILE:WEIGHT' "
    '(docs/prompts.md). Without a limit, as many prompts as the weights allow are drawn.',
    added=True,
  )
  where: tuple[str, ...] = setting(
    (),
    "Keep the prompts whose metadata match, such as ('label=safe',). Values of one name are "
    'alternatives; of several names, each must match.',
    added=True,
  )
  expand: str = setting(
    '',
    "'every_turn' makes a prompt of each turn of the user in a dialogue. '' makes one prompt of a "
    'dialogue, which ends with the last turn.',
    added=True,
  )
  invalid: str = setting(
    'error',
    "What a row that is no prompt does: 'error' ends the run, and 'skip' leaves the row out and "
    'prints how many there were.',
    added=True,
  )
  plain: bool = setting(
    False,
    'Take a text as the words of the user, without looking for labels such as "Human:" in it.',
    added=True,
  )
  system_field: str = setting(
    '', "Field that contains the system message. '' means `system`, beside messages.", added=True
  )
  message_keys: tuple[str, ...] = setting(
    (),
    "Names of the keys with the role and the content of a message, such as ('speaker', 'text'). () "
    "means ('role', 'content') or ('from', 'value').",
    added=True,
  )
  roles: tuple[str, ...] = setting(
    (),
    "Other names of roles in messages, such as ('customer=user', 'agent=assistant').",
    added=True,
  )

  def __post_init__(self) -> None:
    if (self.source or self.mixture) and self.limit != -1 and self.limit < 1:
      raise UserError(f'limit must be at least 1, or -1 for all prompts, but got {self.limit}.')
    if self.source and self.mixture:
      raise UserError('Set source or mixture, not both.')
    if self.expand not in EXPANSIONS:
      raise UserError(f'expand={self.expand!r} must be one of {EXPANSIONS}.')
    if self.invalid not in ('error', 'skip'):
      raise UserError(f"invalid={self.invalid!r} must be 'error' or 'skip'.")
    if len(self.message_keys) not in (0, 2):
      raise UserError(
        f'message_keys={self.message_keys} must be the names of two keys, of the role and of the '
        'content.'
      )
    for pair in self.roles:
      if '=' not in pair or pair.rpartition('=')[2] not in ROLES:
        raise UserError(f"roles: {pair!r} must be 'NAME=ROLE' with a role of {ROLES}.")
    for condition in self.where:
      if not all(condition.partition('=')):
        raise UserError(f"where: {condition!r} must be 'NAME=VALUE', such as 'label=safe'.")


# Files that `save_to_disk` writes at the top of a folder.
_SAVED = ('state.json', 'dataset_dict.json')
EXPANSIONS = ('', 'every_turn')
_MESSAGE_KEYS = ({'role', 'content'}, {'from', 'value'})

SOURCES: Registry[Callable[[PromptSource, int], Iterator[Row]]] = Registry('source of prompts')


def read_rows(source: PromptSource, seed: int) -> Iterator[Row]:
  """Read the rows of a source, found in `SOURCES` by its name or its file suffix.

  Args:
    source: where to read. Shuffling and the limit are the caller's task.
    seed: the seed of the run, for sources that generate their prompts.

  Raises:
    UserError: if there is no such source, it cannot be read, or it does not support a setting.
  """
  name = source.source
  if name not in SOURCES:
    suffix = os.path.splitext(name.lower().removesuffix('.gz'))[1]
    if not suffix or suffix not in SOURCES:
      raise UserError(
        f'{name}: there is no such source of prompts. Give a file whose name ends in one of '
        f'{[s for s in SOURCES if s.startswith(".")]} (plus .gz if compressed), or one of '
        f'{[s for s in SOURCES if not s.startswith(".")]}.'
      )
    name = suffix
  return SOURCES[name](source, seed)


def reject_settings(source: PromptSource, *names: str) -> None:
  """Check that settings that a source does not support are not set.

  Args:
    source: the source.
    names: fields of `PromptSource`.

  Raises:
    UserError: if one of the fields is set.
  """
  unused = [name for name in names if getattr(source, name)]
  if unused:
    raise UserError(
      f'{source.source}: this source does not support {", ".join(unused)}. Remove the setting.'
    )


@SOURCES.register('tfds')
def read_tfds(source: PromptSource, seed: int) -> Iterator[Row]:
  """Yield the rows of a TFDS dataset in ArrayRecord files.

  Args:
    source: names the dataset and its split.
    seed: not used.

  Raises:
    UserError: if TFDS cannot read the dataset.
  """
  reject_settings(source, 'subset')
  _require_name(source)
  import tensorflow_datasets as tfds  # imported here because it takes seconds

  try:
    if os.path.isdir(source.name):
      rows = tfds.builder_from_directory(source.name).as_data_source(source.split)
    else:
      rows = tfds.data_source(source.name, split=source.split)
  except Exception as error:  # TFDS raises many kinds of errors that are not public
    raise UserError(
      f'{source.name}: TFDS cannot read split {source.split!r}: {error!s:.300}. Give the name of a '
      'dataset, or the folder that contains dataset_info.json.'
    ) from error
  for i in range(len(rows)):
    place = f'{source.name}, split {source.split!r}, row {i}'
    try:
      row = _without_arrays(rows[i])
    except UnicodeDecodeError as error:
      raise UserError(f'{place}: the text is not UTF-8: {error}. Write the row again.') from error
    yield place, row


@SOURCES.register('hub')
def read_hub(source: PromptSource, seed: int) -> Iterator[Row]:
  """Yield the rows of a dataset that `datasets` loads.

  Args:
    source: names the dataset, its subset and its split.
    seed: not used.

  Raises:
    UserError: if the dataset cannot be loaded.
  """
  _require_name(source)
  chosen = [
    n for n, default in (('subset', ''), ('split', 'train')) if getattr(source, n) != default
  ]
  return load_hub_rows(source.name, source.subset, source.split, named=chosen)


def load_hub_rows(
  name: str,
  subset: str,
  split: str,
  options: Mapping[str, Any] | None = None,
  named: Container[str] = (),
) -> Iterator[Row]:
  """Yield the rows of a dataset of the hub, or of a folder that `datasets` can load.

  Args:
    name: name of the dataset, a folder with the files of one, or a folder of `save_to_disk`.
    subset: its configuration, or ''.
    split: its split.
    options: further arguments of `datasets.load_dataset`.
    named: those of 'subset' and 'split' that a folder of `save_to_disk` must name, because there
      are several.

  Raises:
    UserError: if the dataset cannot be loaded, or a folder of `save_to_disk` holds another subset
      or split.
  """
  import datasets  # imported here because it takes seconds

  is_saved = any(os.path.isfile(os.path.join(name, file)) for file in _SAVED)
  try:
    if is_saved:
      rows = datasets.load_from_disk(name)
    else:
      rows = datasets.load_dataset(name, subset or None, split=split, **(options or {}))
  except Exception as error:  # errors of the network, the hub and files have no public base class
    raise UserError(
      f'{name}: `datasets` cannot load split {split!r}, subset {subset!r}: {error!s:.300}. Check '
      'the name, the subset and the split.'
    ) from error
  if is_saved:
    rows = _choose_saved(name, rows, subset, split, named)
  for i, row in enumerate(rows):
    yield f'{name}, split {split!r}, row {i}', row


def _choose_saved(name: str, saved: Any, subset: str, split: str, named: Container[str]) -> Any:
  """Return the rows of a folder of `save_to_disk`, if they are those of the subset and split.

  Args:
    name: the folder.
    saved: its `Dataset`, or its `DatasetDict`, whose keys are its splits.
    subset: the subset to read, or '' for any.
    split: the split to read.
    named: those of 'subset' and 'split' that the folder must name.
  """
  if isinstance(saved, dict):
    if split not in saved:
      raise UserError(f'{name} has no split {split!r}. It has {", ".join(saved)}.')
    rows = saved[split]
  else:
    rows = saved
    held = None if rows.split is None else str(rows.split)
    if held is not None and re.fullmatch(rf'{re.escape(split)}\[[^+]*\]', held):
      held = split  # a part of the split, such as 'train[:100]'
    _check_saved(name, 'split', held, split, 'split' in named)
  if subset:
    held = rows.info.config_name
    if held == 'default' != subset:  # rows of files that have no configuration
      held = None
    _check_saved(name, 'subset', held, subset, 'subset' in named)
  return rows


def _check_saved(name: str, setting: str, held: str | None, asked: str, is_named: bool) -> None:
  """Check what a saved folder holds, None if it does not say so, against the value of a setting."""
  if held is None and is_named:
    raise UserError(
      f'{name} does not say which {setting} it holds, so {setting}={asked!r} cannot be checked. '
      'Save what `datasets.load_dataset` returns, or give a file with these rows.'
    )
  if held not in (None, asked):
    raise UserError(
      f'{name} holds the {setting} {held!r}, but the {setting} to read is {asked!r}. Set '
      f'{setting}={held!r}, or give the folder of {asked!r}.'
    )


def _require_name(source: PromptSource) -> None:
  if not source.name:
    raise UserError(f'source={source.source!r} needs a dataset. Give its name or folder as `name`.')


def _without_arrays(value: Any) -> Any:
  """Convert a TFDS row to plain Python: bytes to text, arrays to lists, columns to rows."""
  if isinstance(value, bytes):
    return value.decode()
  if isinstance(value, np.ndarray | list | tuple):
    return [_without_arrays(item) for item in value]
  if isinstance(value, np.generic):
    return value.item()
  if not isinstance(value, dict):
    return value
  value = {key: _without_arrays(item) for key, item in value.items()}
  if set(value) in _MESSAGE_KEYS and all(isinstance(v, list) for v in value.values()):
    # This is how TFDS stores a list of dicts.
    return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
  return value
