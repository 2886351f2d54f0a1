"""Sources of prompts: files, TFDS datasets, the Hugging Face hub, and sources that users register.

A source is a function that yields rows. To add one, register it under a name, which users then set
as `prompts.*.source`. To read a new file format, register it under the suffix of its files:

  @SOURCES.register('.csv')
  def read_csv(source: PromptSource, seed: int) -> Iterator[Row]:
    with open(source.source, newline='', encoding='utf-8') as file:
      for number, row in enumerate(csv.DictReader(file), 1):
        yield f'{source.source}, row {number}', row

The module prompts.py explains what a row contains, and turns rows into prompts.
"""

import dataclasses
import gzip
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cai_jax.runtime.errors import UserError
from cai_jax.runtime.registry import Registry
from cai_jax.runtime.settings import setting

# (place, row): the place names the source and the line or row, for error messages.
Row = tuple[str, Any]

ROW_FORM = (
  'A row needs {"messages": [{"role": .., "content": ..}, ..]}, {"prompt": text or messages} or '
  '{"chosen": dialogue with its answer}; "id" and "metadata" are optional.'
)


@dataclasses.dataclass(frozen=True)
class PromptSource:
  """Where a set of prompts comes from.

  Raises:
    UserError: if the limit of a source is out of range.
  """

  source: str = setting(
    '',
    'A .jsonl file (one row per line), a .txt file (one prompt per line), either of them with .gz '
    "appended, 'tfds', 'hub' or 'tiny'. '' means no prompts.",
    path=True,
  )
  name: str = setting(
    '',
    "Name or folder of the TFDS or hub dataset. For the source 'tiny': 'baited' or 'benign'.",
    path=True,
  )
  subset: str = setting('', 'Configuration of the hub dataset, if it has several.')
  split: str = setting('train', "Split of the dataset. For the source 'tiny': 'train' or 'eval'.")
  field: str = setting(
    '', "Field that contains the prompt. '' means the first of messages, prompt and chosen."
  )
  limit: int = setting(-1, 'Maximum number of prompts to load. -1 loads all.')
  shuffle: bool = setting(False, "Shuffle with the run's seed before applying the limit.")
  metadata_fields: tuple[str, ...] = setting(
    (), 'Further fields of a row to store in the metadata of the prompt, as text.'
  )

  def __post_init__(self) -> None:
    if self.source and self.limit != -1 and self.limit < 1:
      raise UserError(f'limit must be at least 1, or -1 for all prompts, but got {self.limit}.')


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
    suffix = os.path.splitext(name.removesuffix('.gz'))[1]
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


@SOURCES.register('.jsonl')
def read_jsonl(source: PromptSource, seed: int) -> Iterator[Row]:
  """Yield one row per line of a JSON Lines file.

  Args:
    source: names the file.
    seed: not used.

  Raises:
    UserError: if the file cannot be read, or a line is not JSON.
  """
  reject_settings(source, 'name', 'subset')
  for place, line in read_lines(source.source):
    try:
      row = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: also integers with too many digits
      raise UserError(f'{place}: {line!r:.80} is not valid JSON ({error}). {ROW_FORM}') from error
    yield place, row


@SOURCES.register('.txt')
def read_text(source: PromptSource, seed: int) -> Iterator[Row]:
  """Yield one row per line of a text file.

  Args:
    source: names the file.
    seed: not used.

  Raises:
    UserError: if the file cannot be read.
  """
  reject_settings(source, 'name', 'subset')
  for place, line in read_lines(source.source):
    yield place, {'prompt': line}


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
    yield f'{source.name}, split {source.split!r}, row {i}', _without_arrays(rows[i])


@SOURCES.register('hub')
def read_hub(source: PromptSource, seed: int) -> Iterator[Row]:
  """Yield the rows of a dataset that `datasets.load_dataset` loads.

  Args:
    source: names the dataset, its subset and its split.
    seed: not used.

  Raises:
    UserError: if the dataset cannot be loaded.
  """
  _require_name(source)
  import datasets  # imported here because it takes seconds

  try:
    rows = datasets.load_dataset(source.name, source.subset or None, split=source.split)
  except Exception as error:  # errors of the network, the hub and files have no public base class
    raise UserError(
      f'{source.name}: `datasets` cannot load split {source.split!r}, subset {source.subset!r}: '
      f'{error!s:.300}. Check the name, the subset and the split.'
    ) from error
  for i, row in enumerate(rows):
    yield f'{source.name}, split {source.split!r}, row {i}', row


def read_lines(path: str) -> Iterator[tuple[str, str]]:
  """Yield (place, line) for each line of a UTF-8 text file that is not blank.

  Args:
    path: the file; it is decompressed if the name ends in .gz.

  Raises:
    UserError: if the file is missing, is not UTF-8, or its compressed data is damaged.
  """
  if not os.path.isfile(path):
    raise UserError(f'{path}: there is no such file. Give the path of a file.')
  number = 0
  try:
    with gzip.open(path) if path.endswith('.gz') else open(path, 'rb') as file:
      for number, line in enumerate(file, 1):
        text = line.decode('utf-8-sig' if number == 1 else 'utf-8').strip()
        if text:
          yield f'{path}, line {number}', text
  except UnicodeDecodeError as error:
    raise UserError(
      f'{path}, line {number}: the text is not UTF-8: {error}. Save the file as UTF-8.'
    ) from error
  except (EOFError, gzip.BadGzipFile) as error:
    raise UserError(
      f'{path}, after line {number}: the gzip file is damaged: {error}. Compress or download it '
      'again.'
    ) from error


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
  if set(value) == {'role', 'content'} and all(isinstance(v, list) for v in value.values()):
    columns = zip(value['role'], value['content'], strict=True)  # how TFDS stores a list of dicts
    return [{'role': role, 'content': content} for role, content in columns]
  return value
