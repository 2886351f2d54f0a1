"""What the package knows about a published set of prompts, and how it reads one.

A set is loaded from the hub, or from a copy: its files, or a folder. A prompt has the same id and
text wherever its row comes from, and the same metadata as far as the row has the fields. The rows
and fields of the hub and of the publisher's repository may differ, as HarmBench's do
(docs/prompts.md).
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

from cai_jax.data import prompt_files as prompt_files  # importing it registers the file formats
from cai_jax.data.prompt_sources import SOURCES, PromptSource, Row, load_hub_rows, reject_settings
from cai_jax.data.row_form import RowForm
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.registry import Registry
from cai_jax.runtime.text_files import open_bytes


@dataclasses.dataclass(frozen=True)
class PromptSet:
  """A published set of prompts.

  Attributes:
    title: its usual name.
    kind: what its prompts are: 'harmful', 'benign' or 'both'.
    form: which fields of a row hold what.
    licence: of the prompts, as the publisher states it.
    size: number of rows, with the split or subset where there are several.
    hub: its dataset on the Hugging Face Hub.
    repository: its GitHub repository, or '' if the hub is its origin.
    file: the file in the repository, or in the dataset on the hub.
    subsets: configurations of the dataset; the first is the default. () means it has only one.
    splits: splits of the dataset; the first is the default.
    options: further arguments of `datasets.load_dataset`.
    gated: whether the hub asks for an agreement before it gives the files.
    seen: where the form was seen: repositories and commits. 'unverified' means nowhere at its
      publisher.
  """

  title: str
  kind: str
  form: RowForm
  licence: str = 'unknown'
  size: str = ''
  hub: str = ''
  repository: str = ''
  file: str = ''
  subsets: tuple[str, ...] = ()
  splits: tuple[str, ...] = ('train',)
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  gated: bool = False
  seen: str = 'unverified'


PROMPT_SETS: Registry[PromptSet] = Registry('set of prompts')


def register_set(name: str, entry: PromptSet) -> None:
  """Make a set known under a name, which `prompts.*.source` and mixtures can then use.

  Args:
    name: the name.
    entry: the set.

  Raises:
    UserError: if the name is taken.
  """

  def read(source: PromptSource, seed: int) -> Iterator[Row]:
    return _read_set(name, entry, source)

  SOURCES.register(name)(read)
  PROMPT_SETS.register(name)(entry)


def row_form(source: PromptSource) -> RowForm:
  """Return the form of a source's rows: that of its set, if it names one, with its settings.

  Args:
    source: the source.

  Raises:
    UserError: if a local copy is given for a source that is not a set.
  """
  entry = PROMPT_SETS.get(source.source)
  if source.path and entry is None:
    raise UserError(
      f'path={source.path!r} is a copy of a published set, but source={source.source!r} is not one '
      f'of {", ".join(PROMPT_SETS)}. Give the file as source instead.'
    )
  return (entry.form if entry else RowForm()).with_settings(source)


def _read_set(name: str, entry: PromptSet, source: PromptSource) -> Iterator[Row]:
  reject_settings(source, 'name')
  subset = _choose(name, 'subset', source.subset, '', entry.subsets)
  split = _choose(name, 'split', source.split, 'train', entry.splits)
  if os.path.isdir(source.path):
    parts = {'subset': entry.subsets, 'split': entry.splits}
    several = [setting for setting, names in parts.items() if len(names) > 1]
    return load_hub_rows(source.path, subset, split, entry.options, several)
  if source.path:
    return _read_file(name, entry, source)
  return _read_hub(name, entry, subset, split)


def _choose(name: str, setting: str, value: str, default: str, allowed: tuple[str, ...]) -> str:
  """Return the subset or split to read; the default of the setting means the set's first."""
  if value in allowed:
    return value
  if value == default:
    return allowed[0] if allowed else ''
  raise UserError(
    f'{name}: the set has no {setting} {value!r}. It has {", ".join(allowed) or "only one"}.'
  )


def _read_hub(name: str, entry: PromptSet, subset: str, split: str) -> Iterator[Row]:
  """Yield the rows of a set on the hub."""
  try:
    yield from load_hub_rows(entry.hub, subset, split, entry.options)
  except UserError as error:
    gated = ' The hub gives it only to users who accept its conditions.' if entry.gated else ''
    where = f'github.com/{entry.repository}' if entry.repository else entry.hub
    raise UserError(
      f'{name}: {error}{gated} Without a network, download {entry.file} of {where} elsewhere, and '
      'set path to its copy.'
    ) from error


def _read_file(name: str, entry: PromptSet, source: PromptSource) -> Iterator[Row]:
  """Yield the rows of a file with a copy of a set."""
  if source.split not in ('train', entry.splits[0]) or source.subset:
    raise UserError(
      f'{name}: {source.path} is a file, so it has no split or subset. Give the file of that split '
      'as path, and leave split and subset out.'
    )
  suffix = os.path.splitext(source.path.lower().removesuffix('.gz'))[1]
  formats = [key for key in SOURCES if key.startswith('.')]
  if suffix not in formats:
    raise UserError(f'{name}: path={source.path!r} must be a folder or end in one of {formats}.')
  if suffix == '.jsonl' and _is_array(source.path):
    suffix = '.json'
  return SOURCES[suffix](dataclasses.replace(source, source=source.path), 0)


def _is_array(path: str) -> bool:
  """Return whether a file of JSON Lines is one array, as red_team_attempts.jsonl.gz is."""
  with open_bytes(path) as file:
    return file.read(64).lstrip().startswith(b'[')
