"""Where the comparisons of a run come from, by the names that `prefer.data` can have.

A plugin can register a source of its own, such as one in which somebody else judges the pairs.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

from cai_jax.data.preferences import Comparison, read_comparisons
from cai_jax.data.preferences.reading import PreferenceSet
from cai_jax.runtime.registry import Registry

D_CAI, LABELS = 'D_CAI', 'labels'  # what a source reads
LABELS_FILE = 'labels/comparisons.jsonl'  # of a run, which stage label writes


@dataclasses.dataclass(frozen=True)
class Places:
  """Where a run has what sources read.

  Attributes:
    d_cai: folder of its D_CAI.
    labels: file of the comparisons that stage label writes.
    filters: names of the defects to leave out, see `read_comparisons`.
  """

  d_cai: pathlib.Path
  labels: pathlib.Path
  filters: tuple[str, ...] = ()


class Sizes(NamedTuple):
  """What a run has before it starts, at most.

  Attributes:
    chains: number of rows of D_CAI.
    rounds: number of revisions in a row.
    labels: number of comparisons that stage label writes.
  """

  chains: int
  rounds: int
  labels: int


@dataclasses.dataclass(frozen=True)
class PairSource:
  """A source of comparisons within a run.

  Attributes:
    read: returns the comparisons.
    needs: what it reads, `D_CAI` or `LABELS`, which the run must then have.
    margins: whether its comparisons have margins, which some objectives read.
    count: returns how many comparisons it has at most, for estimates before the run.
  """

  read: Callable[[Places], PreferenceSet[Comparison]]
  needs: str
  margins: bool = False
  count: Callable[[Sizes], int] = lambda sizes: sizes.chains


PAIR_SOURCES: Registry[PairSource] = Registry('source of comparisons')


def _read_d_cai(places: Places, pairs: str) -> PreferenceSet[Comparison]:
  return read_comparisons(places.d_cai, 'd_cai', pairs=pairs, filters=places.filters)


def _read_labels(places: Places) -> PreferenceSet[Comparison]:
  return read_comparisons(places.labels, filters=places.filters)


for _name, _pairs, _count in (
  ('implied', 'last_over_initial', lambda sizes: sizes.chains),
  ('rounds', 'each_over_previous', lambda sizes: sizes.chains * sizes.rounds),
  ('every_pair', 'every_pair', lambda sizes: sizes.chains * sizes.rounds * (sizes.rounds + 1) // 2),
):
  PAIR_SOURCES.register(_name)(
    PairSource(functools.partial(_read_d_cai, pairs=_pairs), D_CAI, count=_count)
  )
PAIR_SOURCES.register('labels')(PairSource(_read_labels, LABELS, count=lambda sizes: sizes.labels))
