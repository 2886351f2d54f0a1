"""Read preferences from a file: check every row, filter, and count what is left out.

A file is read twice. The first reading checks all rows and keeps a few bytes of each. The second
one, on each iteration over the result, yields what was kept, so the texts of a large file are never
in memory together.
"""

import array
import collections
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from cai_jax.data import quality
from cai_jax.data.preferences.comparisons import Comparison, JudgedResponse
from cai_jax.data.preferences.d_cai_pairs import PAIRS
from cai_jax.data.preferences.forms import FORMS, attempt, digest64, read_rows
from cai_jax.data.preferences.trl import parse_judged
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.terminal import say

# Defects of `quality.FLAGS` that a prompt and its responses show by themselves.
FILTERS = (
  *('truncated', 'near_identical', 'preamble_phrase', 'role_marker', 'repetition'),
  *('wrong_language', 'off_topic_words'),
)

T = TypeVar('T', Comparison, JudgedResponse)


class PreferenceSet(Iterable[T], Generic[T]):
  """Comparisons or judged responses of a file, which each iteration reads from it again.

  Attributes:
    counts: how many `rows` there were (of D_CAI: pairs), how many were `kept`, and how many were
      `dropped`, by reason.
  """

  def __init__(
    self, read: Callable[[], Iterator[tuple[str, Any]]], kept: np.ndarray, counts: dict[str, Any]
  ):
    self._read, self._kept, self.counts = read, kept, counts

  def __len__(self) -> int:
    return int(self._kept.sum())

  def __iter__(self) -> Iterator[T]:
    for _, item in _select(self._read, self._kept):
      yield item

  def leave_out(self, ids: Iterable[str], reason: str) -> 'PreferenceSet[T]':
    """Return the set without some of its members, which are counted.

    Args:
      ids: the ids of those to leave out.
      reason: what `counts` calls them.

    Raises:
      UserError: if none remains.
    """
    left_out = set(ids)
    kept = self._kept.copy()
    kept[kept] = [item.id not in left_out for item in self]
    dropped = collections.Counter(self.counts['dropped'])
    dropped[reason] += len(self) - int(kept.sum())
    return _make_set(self._read, kept, dropped, 'The preferences')


def read_comparisons(
  path: str | os.PathLike,
  form: str = 'trl',
  *,
  pairs: str = 'last_over_initial',
  invalid: str = 'error',
  filters: Sequence[str] = (),
) -> PreferenceSet[Comparison]:
  """Read the comparisons of a file or of a D_CAI.

  Left out and counted are pairs of equal texts ('identical'), with a blank text ('empty'), and
  those that occur before ('duplicate', in either order). If the same two responses are compared
  again with the opposite result, all of these are 'contradictory'.

  Args:
    path: the file; with the form 'd_cai', the folder d_cai/ of a run.
    form: a name of `FORMS`: 'trl', 'hh_rlhf' or 'd_cai', or one that a plugin registers.
    pairs: which pairs of a chain of D_CAI: 'last_over_initial', 'each_over_previous' or
      'every_pair'.
    invalid: what a row that cannot be read does: 'error' ends the run, and 'skip' leaves it out,
      counts it as 'invalid' and prints how many there were.
    filters: names of `FILTERS`. A comparison whose better response has one of these defects is
      counted as 'filtered_' plus the first defect. The better response of a pair with the
      probability 0.5 is `chosen`.

  Raises:
    UserError: if the file cannot be read, a row is no comparison, two have the same id, or none is
      left. The message names the line or row.
  """
  path = os.fspath(path)
  if pairs not in PAIRS:
    raise UserError(f'pairs={pairs!r} must be one of {tuple(PAIRS)}.')
  read_form = FORMS[form]
  return _read_set(path, lambda: read_form(path, pairs), invalid, filters)


def read_judged(
  path: str | os.PathLike, *, invalid: str = 'error', filters: Sequence[str] = ()
) -> PreferenceSet[JudgedResponse]:
  """Read a file of judged responses in TRL's unpaired preference format.

  A response that occurs before under the same prompt is a 'duplicate'. If it has another label
  there, all of these are 'contradictory'.

  Args:
    path: the file.
    invalid: as for `read_comparisons`.
    filters: as for `read_comparisons`; they apply to desirable responses.

  Raises:
    UserError: as `read_comparisons`.
  """
  path = os.fspath(path)

  def read() -> Iterator[tuple[str, Any]]:
    for place, row in read_rows(path):
      yield place, attempt(parse_judged, row)

  return _read_set(path, read, invalid, filters)


def _read_set(
  path: str,
  read: Callable[[], Iterator[tuple[str, Any]]],
  invalid: str,
  filters: Sequence[str],
) -> PreferenceSet:
  """Return the set of a file, after a first reading that checks all of its rows."""
  if invalid not in ('error', 'skip'):
    raise UserError(f"invalid={invalid!r} must be 'error' or 'skip'.")
  if unknown := [name for name in filters if name not in FILTERS]:
    raise UserError(f'There is no filter {unknown[0]!r} of preferences. Choose from {FILTERS}.')
  dropped: collections.Counter[str] = collections.Counter()
  kept, verdicts = array.array('b'), array.array('b')  # of all rows; of those kept so far
  contents, ids = array.array('Q'), array.array('Q')
  faults: list[str] = []
  for place, item in read():
    if isinstance(item, UserError):
      if invalid == 'error':
        raise UserError(f'{place}: {item}') from item
      faults = faults or [f'{place}: {item}']
    reason = 'invalid' if isinstance(item, UserError) else item
    if not isinstance(reason, str):
      reason = _find_defect(item, filters)
    kept.append(not reason)
    if reason:
      dropped[reason] += 1
      continue
    contents.append(digest64([list(item.prompt), sorted(item.texts)]))
    verdicts.append(-1 if item.verdict is None else item.verdict)
    ids.append(digest64(item.id))
  if faults:
    say(f'{path}: {dropped["invalid"]:,} rows are left out, such as {faults[0]}')
  is_kept = np.array(kept, bool)
  repeats, conflicts = _find_repeats(np.array(contents), np.array(verdicts))
  dropped['duplicate'] += int((repeats & ~conflicts).sum())
  dropped['contradictory'] += int(conflicts.sum())
  is_kept[is_kept] = ~(repeats | conflicts)
  _check_ids(read, is_kept, np.array(ids)[~(repeats | conflicts)])
  return _make_set(read, is_kept, dropped, path)


def _make_set(
  read: Callable[[], Iterator[tuple[str, Any]]],
  kept: np.ndarray,
  dropped: collections.Counter[str],
  name: str,
) -> PreferenceSet:
  """Return a set with its counts, which has at least one member."""
  counts = {
    'rows': len(kept),
    'kept': int(kept.sum()),
    'dropped': {reason: n for reason, n in sorted(dropped.items()) if n},
  }
  if not counts['rows']:
    raise UserError(f'{name} has no row. Give at least one comparison.')
  if not counts['kept']:
    raise UserError(
      f'{name}: none of {len(kept):,} rows is left; dropped: {counts["dropped"]}. '
      'docs/preferences.md says what each reason means.'
    )
  return PreferenceSet(read, kept, counts)


def _find_defect(item: Comparison | JudgedResponse, filters: Sequence[str]) -> str:
  """Return 'filtered_' and the first defect of the better or desirable response, or ''."""
  if not filters:
    return ''
  if isinstance(item, Comparison):
    side = item.better or 0
    other = {'text': item.texts[1 - side]}
    is_cut = item.truncated[side]
  elif item.desirable:
    side, other, is_cut = 0, None, item.truncated
  else:
    return ''
  response = {'text': item.texts[side], 'finish_reason': 'length' if is_cut else 'stop'}
  defects = quality.find_flags(item.prompt, other, None, response)
  return next((f'filtered_{name}' for name in filters if name in defects), '')


def _find_repeats(contents: np.ndarray, verdicts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Return which entries have the content of an earlier one, and which are in a conflict.

  Args:
    contents: u64[N], a hash of what is compared.
    verdicts: i8[N], the result: 0, 1, or -1 for none.

  Returns:
    (bool[N], bool[N]). Entries of equal content are in a conflict if two of them have the results
    0 and 1.
  """
  if not len(contents):
    return np.zeros(0, bool), np.zeros(0, bool)
  _, first, group = np.unique(contents, return_index=True, return_inverse=True)
  repeats = np.ones(len(contents), bool)
  repeats[first] = False
  seen = [np.bincount(group[verdicts == result], minlength=len(first)) > 0 for result in (0, 1)]
  return repeats, (seen[0] & seen[1])[group]


def _select(
  read: Callable[[], Iterator[tuple[str, Any]]], kept: np.ndarray
) -> Iterator[tuple[str, Any]]:
  """Yield the place and the item of each row to keep.

  Raises:
    UserError: if there are fewer or more rows than before, or one to keep is no longer readable.
  """
  place = 'The preferences'
  for found, is_kept in itertools.zip_longest(read(), kept):
    place = found[0] if found else place
    if found is None or is_kept is None or (is_kept and isinstance(found[1], str | UserError)):
      raise UserError(
        f'{place}: the file has changed since its rows were checked. Start again, and leave it as '
        'it is during the run.'
      )
    if is_kept:
      yield found


def _check_ids(
  read: Callable[[], Iterator[tuple[str, Any]]], kept: np.ndarray, ids: np.ndarray
) -> None:
  """Check that no two members have the same id; the texts are only read again if they do."""
  values, counts = np.unique(ids, return_counts=True)
  repeated = set(values[counts > 1].tolist())
  if not repeated:
    return
  places: dict[str, str] = {}
  for place, item in _select(read, kept):
    if digest64(item.id) in repeated:
      if item.id in places:
        raise UserError(
          f'{place}: the id {item.id!r} is already used at {places[item.id]}. Give each row its '
          'own id.'
        )
      places[item.id] = place
