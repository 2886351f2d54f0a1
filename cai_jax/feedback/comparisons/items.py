"""The prompts and the given responses that a job of AI feedback compares."""

import collections
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence

from cai_jax.data.preferences import Comparison, read_comparisons
from cai_jax.data.prompts import Prompt
from cai_jax.feedback.comparisons.config import LabelConfig
from cai_jax.feedback.comparisons.records import Item
from cai_jax.runtime.errors import UserError
from cai_jax.scoring.judge import LABELLED


def read_items(config: LabelConfig, prompts: Sequence[Prompt]) -> tuple[Item, ...]:
  """Return what is compared: prompts or comparisons of files, then the labelled sets.

  Args:
    config: the settings.
    prompts: the prompts whose responses are sampled.

  Raises:
    UserError: if a file cannot be read, there is no prompt, or two prompts, or two comparisons of
      files, have the same id.
  """
  if config.responses:
    items = [Item(prompt.id, prompt.id, tuple(prompt.messages)) for prompt in prompts]
    _check_prompts(items)
  else:
    items = []
    for path in config.comparisons:
      comparisons = _first(read_comparisons(path, config.form), config.comparisons_limit)
      items += _given('comparison', path, comparisons, is_written=True)
    _check_files(items)
  for source in config.labelled:
    labelled = _first(_read_labelled(source, config), config.labelled_limit)
    items += _given('labelled', source, labelled, is_written=False)
  return tuple(_number_repeats(items))


def _given(
  prefix: str, source: str, comparisons: Iterable[Comparison], is_written: bool
) -> Iterator[Item]:
  """Yield the items of given responses.

  Their randomness depends on the prompt and the texts, and not on the paths or the order of files.
  """
  for comparison in comparisons:
    texts = comparison.chosen, comparison.rejected
    content = json.dumps([list(comparison.prompt), texts], sort_keys=True).encode()
    yield Item(
      f'{prefix} {hashlib.sha256(content).hexdigest()}',
      comparison.id,
      comparison.prompt,
      texts,
      comparison.better,
      source,
      comparison.truncated,
      is_written,
    )


def _read_labelled(source: str, config: LabelConfig) -> Iterable[Comparison]:
  """Return the comparisons of a labelled set, which is a file or has a name."""
  if source not in LABELLED:
    return read_comparisons(source, config.labelled_form)
  rows = LABELLED[source](config.labelled_limit)
  return [
    Comparison(f'{source}-{i}', tuple(row['prompt']), row['chosen'], row['rejected'], source=source)
    for i, row in enumerate(rows)
  ]


def _first(comparisons: Iterable[Comparison], limit: int) -> Iterator[Comparison]:
  """Return an iterator over the first comparisons; -1 sets no limit."""
  return itertools.islice(comparisons, None if limit == -1 else limit)


def _number_repeats(items: Iterable[Item]) -> Iterator[Item]:
  """Yield the items; those of a content that an earlier file has too get ids of their own."""
  seen: collections.Counter[str] = collections.Counter()
  for item in items:
    seen[item.id] += 1
    number = seen[item.id]
    yield item if number == 1 else dataclasses.replace(item, id=f'{item.id} {number}')


def _check_files(items: Sequence[Item]) -> None:
  """Raise UserError if comparisons of two files have the same id. Ids within a file differ."""
  sources: dict[str, str] = {}
  for item in items:
    if item.name in sources:
      raise UserError(
        f'label.comparisons: {sources[item.name]} and {item.source} both have the id '
        f'{item.name!r}, but the labels are written into one file. Give each row its own id.'
      )
    sources[item.name] = item.source


def _check_prompts(items: Sequence[Item]) -> None:
  """Raise UserError if there is no prompt, or two have the same id."""
  if not items:
    raise UserError('label: there is no prompt to sample responses to. Give at least one.')
  seen: set[str] = set()
  for item in items:
    if item.id in seen:
      raise UserError(f'label: two prompts have the id {item.id!r}. Give each its own.')
    seen.add(item.id)
