"""Read the comparisons that a section of the config names."""

import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from cai_jax.data.preferences import (
  FORMS,
  Comparison,
  JudgedResponse,
  find_held_out,
  judge_both,
  read_comparisons,
)
from cai_jax.data.preferences.reading import PreferenceSet
from cai_jax.data.prompts import Prompt
from cai_jax.pipeline import prompt_sets
from cai_jax.pipeline.pair_sources import LABELS_FILE, PAIR_SOURCES, Places
from cai_jax.pipeline.preference_config import PolicyConfig, RewardConfig
from cai_jax.pipeline.run import Run
from cai_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Pairs:
  """The comparisons of a training, which each iteration reads again: a source of `part_files`.

  Attributes:
    comparisons: the comparisons.
    shuffle_seed: seed by which sides are exchanged; None exchanges none.
  """

  comparisons: PreferenceSet[Comparison]
  shuffle_seed: int | None = None

  @property
  def counts(self) -> dict[str, Any]:
    """How many comparisons were read and left out."""
    return {'read': self.comparisons.counts}

  @functools.cached_property
  def digest(self) -> str:
    """A hex digest of the comparisons in their order, as they are learned."""
    digest = hashlib.sha256()
    for pair in self:
      digest.update(json.dumps(dataclasses.asdict(pair), sort_keys=True).encode() + b'\n')
    return digest.hexdigest()[:32]

  def __iter__(self) -> Iterator[Comparison]:
    for pair in self.comparisons:
      yield pair if self.shuffle_seed is None else exchange_sides(pair, self.shuffle_seed)

  def __len__(self) -> int:
    return len(self.comparisons)

  def batches(self, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[Sequence[Comparison]]]:
    """Yield the comparisons of each range, which are read one after the other.

    Args:
      ranges: (begin, end) of each range, which ascend.
    """
    remaining, place = iter(self), 0
    for begin, end in ranges:
      yield (tuple(itertools.islice(remaining, begin - place, end - place)),)
      place = end


@dataclasses.dataclass(frozen=True)
class Judged(Iterable[JudgedResponse]):
  """Both responses of comparisons, each judged on its own; see `judge_both`.

  Attributes:
    pairs: the comparisons.
  """

  pairs: Iterable[Comparison]

  def __iter__(self) -> Iterator[JudgedResponse]:
    return judge_both(self.pairs)


@dataclasses.dataclass(frozen=True)
class JudgedPairs(Judged):
  """Those of the comparisons of a training: a source of `part_files`, with a row for each of them.

  Attributes:
    pairs: the comparisons.
  """

  pairs: Pairs

  @property
  def digest(self) -> str:
    """The digest of the comparisons."""
    return self.pairs.digest

  def __len__(self) -> int:
    return len(self.pairs)

  def batches(self, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[Judged]]:
    """Yield the responses of each range of comparisons; see `Pairs.batches`.

    Args:
      ranges: (begin, end) of each range, which ascend.
    """
    return ((Judged(pairs),) for (pairs,) in self.pairs.batches(ranges))


def read_pairs(run: Run, config: PolicyConfig | RewardConfig) -> Pairs:
  """Return the comparisons that a section of the config names.

  Args:
    run: the run.
    config: the section `prefer` or `reward`.

  Raises:
    UserError: if they cannot be read, none is left, or one has a prompt that the run holds out; the
      message names the field.
  """
  places = Places(run.d_cai, run.workdir / LABELS_FILE, config.filters)
  try:
    if config.data in PAIR_SOURCES:
      found = PAIR_SOURCES[config.data].read(places)
    else:
      found = _read_file(config)
    found = leave_out_held_out(found, run)
  except UserError as error:
    raise UserError(f'{config.section}.data={config.data!r}: {error}') from error
  return Pairs(found, run.config.seed if config.shuffle else None)


def _read_file(config: PolicyConfig | RewardConfig) -> PreferenceSet[Comparison]:
  """Return the comparisons of a file.

  Its rows are checked once in a process while it does not change, because the checks before the run
  and several trainings may name the same file.
  """
  path, filters = pathlib.Path(config.data), tuple(config.filters)
  if not path.is_file():
    return read_comparisons(path, config.form, invalid=config.invalid, filters=filters)
  stat = path.stat()
  version = stat.st_ino, stat.st_size, stat.st_mtime_ns, FORMS.get(config.form)
  return _read_version(path, config.form, config.invalid, filters, version)


@functools.lru_cache(maxsize=8)
def _read_version(
  path: pathlib.Path, form: str, invalid: str, filters: tuple[str, ...], version: Any
) -> PreferenceSet[Comparison]:
  del version  # a part of the key only
  return read_comparisons(path, form, invalid=invalid, filters=filters)


def leave_out_held_out(found: PreferenceSet[Comparison], run: Run) -> PreferenceSet[Comparison]:
  """Return comparisons without those whose prompt nearly equals a held-out one.

  As for training prompts, a prompt that equals one is an error, and the prompts of the embedded
  world are only compared exactly, because its grammar makes them similar.

  Args:
    found: the comparisons.
    run: the run.

  Raises:
    UserError: if one has a held-out prompt, or none is left.
  """
  prompt_sets.check_held_out((Prompt(pair.id, pair.prompt) for pair in found), run.prompts)
  held_out = [
    prompt.messages
    for name in prompt_sets.HELD_OUT
    if getattr(run.config.prompts, name).source != 'tiny'
    for prompt in run.prompts[name]
  ]
  near = find_held_out(found, held_out)
  return found.leave_out(near, 'near_held_out') if near else found


def exchange_sides(pair: Comparison, seed: int) -> Comparison:
  """Return a comparison, whose sides are exchanged with probability 0.5.

  Args:
    pair: the comparison.
    seed: decides it, together with the comparison's id.
  """
  if random.Random(f'exchange sides/{seed}/{pair.id}').random() < 0.5:
    return pair
  return dataclasses.replace(
    pair,
    chosen=pair.rejected,
    rejected=pair.chosen,
    margin=None if pair.margin is None else -pair.margin,
    scores=None if pair.scores is None else pair.scores[::-1],
    truncated=pair.truncated[::-1],
  )
