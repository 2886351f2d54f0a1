"""Read and format the numbers of a result summary.

A summary has up to three groups, each a dict from a row's name to its numbers:

  {'stages': {'initial': {...}, 'revision_1': {...}}, 'models': {'base': ..., 'aligned': ...},
   'benign': {'base': ..., 'aligned': ...}}

Any row may have `differences`, paired ones to another row, in the form of the module `differences`.
A row has rates (`*_rate`, in [0, 1]), means and counts. Any number NAME may have a 95 % interval
under `NAME_interval`. Without a scorer there are no rates, and a table has no columns for them.
"""

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any

from cai_jax.runtime.errors import UserError, show
from cai_jax.runtime.shapes import check_shape, optional

GROUPS = {
  'stages': 'Held-out prompts, round by round',
  'models': 'Held-out prompts, models',
  'benign': 'Held-out benign prompts, models',
}
HEADINGS = {
  'violation_rate': 'breaks a rule',
  'grammar_violation_rate': 'grammar',  # of the embedded world; see pipeline/ground_truth.py
  'helpful_rate': 'still answers',
  'grammar_helpful_rate': 'grammar',
  'refusal_rate': 'refused',
  'off_topic_rate': 'off topic',
  'looping_rate': 'looping',
  'changed_rate': 'changed',
  'truncated_rate': 'truncated',
  'topic_score': 'topic score',
  'mean_tokens': 'mean tokens',
  'count': 'count',
}
# Headings of columns that stand behind these, in the order of their rows.
FURTHER_HEADINGS = {
  'kl': 'KL from M_θ, nats',
  'win_rate': 'wins against M_θ',
  'equal_length_win_rate': 'at equal lengths',
}
DIFFERENCE = {
  'to': str,
  'value': float,
  'interval': [float],
  'p_value': float,
  'adjusted_p_value': float,
}
MISSING = '–'  # shown in place of an absent number


def groups(summary: dict[str, Any]) -> list[tuple[str, dict[str, dict[str, Any]]]]:
  """Return (title, {name: row}) for each group that has rows, in the order to show them.

  Args:
    summary: the summary of a run.

  Raises:
    UserError: if the summary has an unknown group.
  """
  unknown = sorted(set(summary) - set(GROUPS))
  if unknown:
    raise UserError(f'The summary has unknown groups {unknown}. A report shows {list(GROUPS)}.')
  return [
    (title, dict(sorted(summary[group].items(), key=_reading_order)))
    for group, title in GROUPS.items()
    if summary.get(group)
  ]


def check_summary(summary: dict[str, Any], place: str = 'the summary') -> None:
  """Check every value of a summary, so that it can be shown.

  Args:
    summary: the summary of a run.
    place: its file, for the error message.

  Raises:
    UserError: if a value has the wrong type, is not a rate, or is not an interval; the message
      names the file and the key.
  """
  named_rows = {...: {...: object}}
  check_shape(summary, {optional(group): (named_rows, None) for group in GROUPS}, place)
  with prefixed_errors(place):
    shown = groups(summary)
  for _, rows in shown:
    for name, row in rows.items():
      differences = row.get('differences', {})
      check_shape(differences, {...: DIFFERENCE}, f'{place}: differences of {show(name)}')
      for key, value in row.items():
        if key == 'differences':
          continue
        kind = key.rpartition('_')[2]
        shape = {'interval': ([float], None), 'rate': (float, None)}.get(kind, (float, str, None))
        check_shape(value, shape, f'{place}: {key} of {show(name)}')
      with prefixed_errors(f'{place}: {show(name)}'):
        for key in columns({'stages': {name: row}}):
          cell(row, key)


@contextlib.contextmanager
def prefixed_errors(place: str) -> Iterator[None]:
  """Put the place in front of the message of a UserError."""
  try:
    yield
  except UserError as error:
    raise UserError(f'{place}: {error}') from error


def columns(summary: dict[str, Any]) -> list[str]:
  """Return the keys of all rows, those of `HEADINGS` first.

  Intervals are not columns: `cell` formats a number together with its interval.

  Args:
    summary: the summary of a run.
  """
  rows = [row for _, rows in groups(summary) for row in rows.values()]
  keys = dict.fromkeys(
    key for row in rows for key in row if not key.endswith(('_interval', 'differences'))
  )
  return [key for key in HEADINGS if key in keys] + [key for key in keys if key not in HEADINGS]


def heading(key: str) -> str:
  """Return the heading of a column, such as 'still answers' for `helpful_rate`."""
  return (HEADINGS | FURTHER_HEADINGS).get(key, key.replace('_', ' '))


def cell(row: dict[str, Any], key: str) -> str:
  """Return one number and its interval as text, or a dash if the row lacks the number.

  Args:
    row: the numbers of a row.
    key: the key of the number. Rates are shown in per cent.

  Raises:
    UserError: if a rate is not in [0, 1], or an interval is not (low, high).
  """
  value = row.get(key)
  if value is None:
    return MISSING
  bounds = interval(row, key)
  if key.endswith('_rate'):
    text = f'{100 * check_rate(value, key):.1f} %'
    return text + (f' [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]' if bounds else '')
  if isinstance(value, bool) or not isinstance(value, int | float):
    return str(value)
  if isinstance(value, int) and not bounds:
    return f'{value:,}'
  decimals = num_decimals(value)
  brackets = ', '.join(f'{bound:,.{decimals}f}' for bound in bounds or ())
  return f'{value:,.{decimals}f}' + (f' [{brackets}]' if bounds else '')


def num_decimals(value: float) -> int:
  """Return the number of decimals to show: one, or more if the absolute value is below 1."""
  if not math.isfinite(value) or value == 0 or abs(value) >= 1:
    return 1
  return min(6, 2 - math.floor(math.log10(abs(value))))


def check_rate(value: float, key: str) -> float:
  """Return a number unchanged if it is a rate, in [0, 1].

  Args:
    value: the number to check.
    key: its name, for the error message.

  Raises:
    UserError: if it is not a rate.
  """
  if not (isinstance(value, int | float) and 0 <= value <= 1):
    raise UserError(f'{key} is {value!r}. A rate must be in [0, 1]; leave it out if it is unknown.')
  return value


def interval(row: dict[str, Any], key: str) -> tuple[float, float] | None:
  """Return the (low, high) interval of a number, or None if the row has none.

  Args:
    row: the numbers of a row.
    key: the key of the number.

  Raises:
    UserError: if the interval is not (low, high), or the bounds of a rate are not in [0, 1].
  """
  bounds = row.get(f'{key}_interval')
  if bounds is None:
    return None
  if len(bounds) != 2 or bounds[0] > bounds[1]:
    raise UserError(
      f'{key}_interval is {bounds!r}. An interval must be [low, high]; leave it out if it is '
      'unknown.'
    )
  if key.endswith('_rate'):
    return check_rate(bounds[0], f'{key}_interval'), check_rate(bounds[1], f'{key}_interval')
  return bounds[0], bounds[1]


def round_number(stage: str) -> int | None:
  """Return 0 for 'initial', n for 'revision_n', and None for any other stage."""
  match = re.fullmatch(r'revision_([0-9]{1,9})', stage)
  return 0 if stage == 'initial' else int(match[1]) if match else None


def _reading_order(item: tuple[str, dict[str, Any]]) -> float:
  # JSON with sorted keys puts `aligned` before `base` and `revision_10` before `revision_2`. The
  # sort is stable, so all other rows follow in their given order.
  name = item[0]
  number = {'base': 0, 'aligned': 1}.get(name, round_number(name))
  return math.inf if number is None else number
