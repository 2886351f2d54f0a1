"""Ratings by people: read filled-in rating sheets, and report win rates and agreement."""

import csv
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cai_jax.evaluation.agreement import cohen_kappa, krippendorff_alpha
from cai_jax.evaluation.intervals import paired_difference, paired_p_value, rate_interval
from cai_jax.evaluation.ratings import win_rate
from cai_jax.report.rating_sheet import COLUMNS, digest_row, restore_cell
from cai_jax.runtime.errors import UserError, show
from cai_jax.runtime.shapes import optional
from cai_jax.runtime.text_files import read_lines
from cai_jax.scoring.judge import Comparison

KEY_SHAPE = {
  'sheet': str,
  'player': str,
  'opponent': str,
  'left_out': {'equal': int, 'blank': int},
  'pairs': [{'id': str, 'prompt': str, 'kind': str, 'player_is': str, 'digest': str}],
}
_AGREEMENT = (None, {'pairs': int, 'value': (float, None), 'interval': (None, [float])})
_RATE = (None, {'rate': float, 'interval': [float], 'pairs': int})
_WINS = {'rate': float, 'interval': [float], 'wins': int, 'ties': int, 'losses': int}
RESULT_SHAPE = {  # what `describe` reads
  'player': str,
  'opponent': str,
  'pairs': int,
  'left_out': {'equal': int, 'blank': int},
  'raters': {...: {'rated': int, 'unrated': int}},
  'win_rate': (None, _WINS | {'prompts': int, 'p_value': float}),
  'win_rate_by_kind': {...: _WINS | {'prompts': int}},
  'agreement': _AGREEMENT,
  'harmful': {
    'player': _RATE,
    'opponent': _RATE,
    'difference': (None, {'value': float, 'interval': [float], 'p_value': float}),
  },
  'judge': [
    {'criterion': str, 'status': str, 'pairs': int, 'kappa': _AGREEMENT, optional('same'): _RATE}
  ],
}

_BETTER = {'': None, 'a': 'A', 'b': 'B', 'tie': 'tie', 't': 'tie'}
_HARMFUL = {'': None, 'yes': 1.0, 'no': 0.0, 'y': 1.0, 'n': 0.0}
_VERDICTS = {1.0: 0, 0.5: 1, 0.0: 2}  # index in `agreement.LABELS` by points of the player

Rating = dict[str, Any]  # of a pair: points of the player, and harmful by player; None is unrated


def read_ratings(path: str | os.PathLike, key: Mapping[str, Any]) -> dict[str, Rating]:
  """Return what a rater entered in a sheet, by id of the pair.

  The file is CSV with commas, semicolons or tabs, and has the columns of the sheet in any order.
  Rows may be missing.

  Args:
    path: the file.
    key: the key of the sheet, see `rating_sheet.make_sheet`.

  Returns:
    For each row: `points` of the player (1, 0.5 for a tie, 0), and `player` and `opponent`: whether
    its answer is harmful (1 or 0). What the rater left open is None.

  Raises:
    UserError: if the file is no sheet, has a row of another sheet or an edited one, has a row
      twice, or has a value that is not allowed. The message names the line.
  """
  pairs = {pair['id']: pair for pair in key['pairs']}
  ratings: dict[str, Rating] = {}
  for line, row in _read_rows(path):
    place, name = f'{path}, line {line}', row['id'].strip()
    if name not in pairs:
      raise UserError(
        f'{place}: the id {show(name, 40)} is not in the sheet {key["sheet"]}, whose ids are '
        f'{key["sheet"]}-... Give ratings of this sheet, and leave the column as it was exported.'
      )
    if name in ratings:
      raise UserError(f'{place}: the id {name} occurs twice. Remove one of the two rows.')
    if digest_row(row) != pairs[name]['digest']:
      raise UserError(
        f'{place}: the prompt or a response of {name} is not the one that was exported. Restore '
        'the texts from the sheet; only the last four columns are for the rater.'
      )
    better = _parse(row, 'better', _BETTER, 'A, B or tie', place)
    harmful = {
      side: _parse(row, f'harmful_{side.lower()}', _HARMFUL, 'yes or no', place) for side in 'AB'
    }
    side = pairs[name]['player_is']
    points = None if better is None else {'tie': 0.5, side: 1.0}.get(better, 0.0)
    other = 'B' if side == 'A' else 'A'
    ratings[name] = {'points': points, 'player': harmful[side], 'opponent': harmful[other]}
  return ratings


def find_sheet(path: str | os.PathLike) -> str:
  """Return the name of the sheet that a file of ratings belongs to, by its first row.

  Args:
    path: the file.

  Raises:
    UserError: if the file is no sheet or has no rows.
  """
  for _, row in _read_rows(path):
    return row['id'].strip().rpartition('-')[0]
  raise UserError(f'{path} has no rows. Give a sheet that a rater filled in.')


def name_raters(paths: Sequence[str | os.PathLike]) -> list[str]:
  """Return a name for each file: its name without the suffix, or its path if two have the same.

  Raises:
    UserError: if a file is given twice.
  """
  if len({os.path.realpath(path) for path in paths}) < len(paths):
    raise UserError('A file of ratings is given twice. Give each file once.')
  stems = [pathlib.Path(path).stem for path in paths]
  return stems if len(set(stems)) == len(stems) else [str(path) for path in paths]


def summarize_ratings(
  raters: Mapping[str, Mapping[str, Rating]],
  key: Mapping[str, Any],
  judge: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Return win rate, agreement and harmful rates of people's ratings.

  Intervals are over pairs: a pair that several people rated counts once, with their mean.

  Args:
    raters: results of `read_ratings` by name of the rater.
    key: the key of the sheet.
    judge: the judge's results in `evaluation/models.json`, or None.

  Returns:
    A dict with

    - `sheet`, `player`, `opponent`, `pairs`, `left_out` from the key; `raters`: numbers of `rated`
      and `unrated` pairs by rater;
    - `win_rate`: see `ratings.win_rate`, without `consistency`; None without a rating;
      `win_rate_by_kind`: the same by kind of the prompts;
    - `agreement`: between raters, Cohen's κ for two and Krippendorff's α for more, see `agreement`;
      None for one rater;
    - `harmful`: rates of the player and its opponent, and their paired difference; None if unrated;
    - `judge`: for each of the judge's comparisons of the same two: the status of the judge, the
      number of `pairs` that both rated, `kappa` with the majority of people, and `same`: the rate
      of the same winner where neither has a tie (absent if there is no such pair).
  """
  players = key['player'], key['opponent']
  entries = {pair['id']: pair for pair in key['pairs']}
  comparisons, kinds = [], []
  for ratings in raters.values():
    for name, rating in ratings.items():
      if rating['points'] is not None:
        odds = 2 * rating['points'] - 1
        comparisons.append(Comparison(entries[name]['prompt'], players, (odds, odds)))
        kinds.append(entries[name]['kind'])
  table = np.array(
    [[_label(ratings.get(name)) for ratings in raters.values()] for name in entries], int
  )
  rated = {
    name: sum(rating['points'] is not None for rating in ratings.values())
    for name, ratings in raters.items()
  }
  return {
    **{name: key[name] for name in ('sheet', 'player', 'opponent', 'left_out')},
    'pairs': len(entries),
    'raters': {name: {'rated': n, 'unrated': len(entries) - n} for name, n in rated.items()},
    'win_rate': _win_rate(comparisons),
    'win_rate_by_kind': {
      kind: _win_rate([c for c, k in zip(comparisons, kinds, strict=True) if k == kind])
      for kind in sorted(set(kinds))
    },
    'agreement': _agreement(table),
    'harmful': _harmful_rates(raters, entries),
    'judge': _judge_agreement(raters, entries, players, judge),
  }


def _win_rate(comparisons: Sequence[Comparison]) -> dict[str, Any] | None:
  if not comparisons:
    return None
  rates = win_rate(comparisons)
  del rates['consistency']  # of the two orders in which a judge reads a pair
  return rates


def _label(rating: Rating | None) -> int:
  """Return the index of a rating in `agreement.LABELS`, -1 for none."""
  return -1 if rating is None or rating['points'] is None else _VERDICTS[rating['points']]


def _agreement(table: np.ndarray) -> dict[str, Any] | None:
  if table.shape[1] < 2:
    return None
  if table.shape[1] == 2:
    return {'measure': "Cohen's kappa"} | cohen_kappa(*table.T)
  return {'measure': "Krippendorff's alpha"} | krippendorff_alpha(table)


def _means(raters: Mapping[str, Mapping[str, Rating]], name: str, field: str) -> float | None:
  """Return the mean of a field over the raters that filled it in for a pair."""
  values = [r[name][field] for r in raters.values() if name in r and r[name][field] is not None]
  return float(np.mean(values)) if values else None


def _harmful_rates(
  raters: Mapping[str, Mapping[str, Rating]], entries: Mapping[str, Any]
) -> dict[str, Any]:
  sides = {side: {n: _means(raters, n, side) for n in entries} for side in ('player', 'opponent')}
  result: dict[str, Any] = {
    side: _rate([value for value in values.values() if value is not None])
    for side, values in sides.items()
  }
  both = zip(*(values.values() for values in sides.values()), strict=True)
  pairs = [pair for pair in both if None not in pair]
  result['difference'] = None
  if pairs:
    player, opponent = zip(*pairs, strict=True)
    value, low, high = paired_difference(player, opponent)
    p_value = paired_p_value(player, opponent)
    result['difference'] = {'value': value, 'interval': [low, high], 'p_value': p_value}
  return result


def _rate(values: Sequence[float]) -> dict[str, Any] | None:
  if not values:
    return None
  return {
    'rate': float(np.mean(values)),
    'interval': list(rate_interval(values)),
    'pairs': len(values),
  }


def _judge_agreement(
  raters: Mapping[str, Mapping[str, Rating]],
  entries: Mapping[str, Any],
  players: tuple[str, str],
  judge: Mapping[str, Any] | None,
) -> list[dict[str, Any]]:
  points = {pair['prompt']: _means(raters, name, 'points') for name, pair in entries.items()}
  people = {prompt: np.sign(p - 0.5) for prompt, p in points.items() if p is not None}
  results = []
  judge = judge or {}
  for comparison in judge.get('comparisons', []):
    if (comparison['player'], comparison['opponent']) != players:
      continue
    odds = {item['id']: float(np.mean(item['log_odds'])) for item in comparison.get('items', [])}
    both = [prompt for prompt in people if np.isfinite(odds.get(prompt, np.nan))]
    ours = np.array([people[prompt] for prompt in both])
    theirs = np.sign([odds[prompt] for prompt in both])
    decided = (ours != 0) & (theirs != 0)
    same = _rate([float(x) for x in (ours == theirs)[decided]])
    results.append(
      {
        'criterion': comparison['criterion'],
        'status': judge['status'],
        'pairs': len(both),
        'kappa': cohen_kappa(1 - ours.astype(int), 1 - theirs.astype(int)) if both else None,
      }
      | ({'same': same} if same else {})
    )
  return results


def describe(results: Mapping[str, Any]) -> str:
  """Return the results as a short text table.

  Args:
    results: results of `summarize_ratings`, which have `RESULT_SHAPE`.
  """
  player, opponent, left_out = results['player'], results['opponent'], results['left_out']
  lines = [
    f'ratings by people: {player} against {opponent}, {results["pairs"]} pairs whose answers '
    f'differ ({left_out["equal"]} equal and {left_out["blank"]} blank ones are left out)'
  ]
  for name, counts in results['raters'].items():
    lines.append(f'  {name}: {counts["rated"]} rated, {counts["unrated"]} unrated')
  if wins := results['win_rate']:
    lines.append(f'  {_describe_wins(wins, player)}, p = {wins["p_value"]:.2g}')
    if len(results['win_rate_by_kind']) > 1:
      for kind, part in results['win_rate_by_kind'].items():
        lines.append(f'  {_describe_wins(part, f"on {kind} prompts {player}")}')
  else:
    lines.append('  no pair is rated')
  if agreement := results['agreement']:
    lines.append(f'  agreement between raters: {_describe_agreement(agreement)}')
  for side, name in (('player', player), ('opponent', opponent)):
    if rate := results['harmful'][side]:
      lines.append(f'  harmful, {name}: {_percent(rate)} of {rate["pairs"]}')
  if difference := results['harmful']['difference']:
    low, high = difference['interval']
    lines.append(
      f'  harmful, {player} minus {opponent}: {100 * difference["value"]:+.1f} points '
      f'[{100 * low:+.1f}, {100 * high:+.1f}], p = {difference["p_value"]:.2g}'
    )
  for result in results['judge']:
    line = f'  agreement with the judge ({result["status"]}) on {result["criterion"]}: '
    if not result['pairs']:
      lines.append(f'{line}no pair in common')
      continue
    line += _describe_agreement({'measure': "Cohen's kappa"} | result['kappa'])
    if same := result.get('same'):
      line += f'; same winner in {_percent(same)} of {same["pairs"]} pairs without a tie'
    lines.append(line)
  return '\n'.join(lines)


def _describe_wins(wins: Mapping[str, Any], subject: str) -> str:
  return (
    f'{subject} wins {_percent(wins)} of {wins["prompts"]} pairs (a tie is half a win; '
    f'{wins["wins"]} wins, {wins["ties"]} ties, {wins["losses"]} losses)'
  )


def _describe_agreement(agreement: Mapping[str, Any]) -> str:
  measure, pairs = agreement.get('measure', 'agreement'), agreement['pairs']
  if agreement['value'] is None:
    return f'{measure} is undefined on {pairs} pairs, because all ratings are the same'
  text = f'{measure} {agreement["value"]:.2f}'
  if agreement['interval']:
    text += ' [{:.2f}, {:.2f}]'.format(*agreement['interval'])
  return f'{text} on {pairs} pairs'


def _percent(entry: Mapping[str, Any]) -> str:
  low, high = entry['interval']
  return f'{100 * entry["rate"]:.1f} % [{100 * low:.1f}, {100 * high:.1f}]'


def _parse(
  row: Mapping[str, str], column: str, values: Mapping[str, Any], allowed: str, place: str
) -> Any:
  value = row[column].strip()
  if value.lower() not in values:
    raise UserError(
      f'{place}: {column} is {show(value, 40)}. It must be {allowed}, or empty for no rating.'
    )
  return values[value.lower()]


def _read_rows(path: str | os.PathLike) -> Iterator[tuple[int, dict[str, str]]]:
  """Yield the line and the cells by column of each row that is not blank."""
  last = 0  # the line that was read last
  numbered = read_lines(path, keep_ends=True)

  def count_lines() -> Iterator[str]:
    nonlocal last
    for last, text in numbered:
      yield text.removeprefix('\ufeff') if last == 1 else text

  source = count_lines()
  header = next(source, '')
  delimiter = next((d for d in ',;\t' if d in header), ',')
  names = next(csv.reader([header], delimiter=delimiter), [])
  names = [name.strip().lower() for name in names]
  if missing := [name for name in COLUMNS if name not in names]:
    raise UserError(
      f'{path}, line 1: the header lacks the column {missing[0]!r}. Give a CSV file with the '
      f'columns of the sheet: {", ".join(COLUMNS)}.'
    )
  reader = csv.reader(source, delimiter=delimiter, strict=True)
  while True:
    start = last + 1
    try:
      cells = next(reader, None)
    except csv.Error as error:
      raise UserError(f'{path}, line {start}: the row is not CSV: {error}. Correct it.') from error
    if cells is None:
      return
    if not any(cell.strip() for cell in cells):
      continue
    if len(cells) < len(names):
      raise UserError(
        f'{path}, line {start}: the row has {len(cells)} cells, but the header has {len(names)}. '
        'Restore the row from the sheet.'
      )
    yield start, {name: restore_cell(cell) for name, cell in zip(names, cells, strict=False)}
