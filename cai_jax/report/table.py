"""The result table of a run, as rows of text cells and as aligned plain text.

A summary has up to three groups, each a dict from a name to that row's numbers:

  {'stages': {'initial': {...}, 'revision_1': {...}}, 'models': {'base': ..., 'aligned': ...},
   'benign': {'base': ..., 'aligned': ...}}

A row's numbers are shares in [0, 1] (`*_rate`, each with an optional `*_rate_interval`), means and
counts. A run that has no oracle has no rates: then the table has no such column.
"""

import math
import re

from cai_jax.runtime.errors import UserError

GROUPS = {
  'stages': 'Held-out prompts, round by round',
  'models': 'Held-out prompts, models',
  'benign': 'Held-out benign prompts, models',
}
HEADINGS = {
  'violation_rate': 'breaks a rule',
  'helpful_rate': 'still answers',
  'mean_tokens': 'mean tokens',
  'count': 'count',
}
MISSING = '–'


def table(summary: dict) -> str:
  """Returns the summary as lines of aligned columns, with 95 % intervals in brackets.

  Raises:
    ValueError: as `groups` and `cell` do.
  """
  keys = columns(summary)
  blocks = groups(summary)
  if not blocks:
    return 'Nothing was evaluated in this run.'
  rows = [row for _, named in blocks for row in named.values()]
  shown = {key: aligned([cell(row, key) for row in rows]) for key in keys}
  lines = [['', *(heading(key) for key in keys)]]
  for title, named in blocks:
    lines.append([title] + [''] * len(keys))
    lines += [['  ' + name, *(shown[key].pop(0) for key in keys)] for name in named]
  text = in_columns(lines)
  if any('[' in line for line in text):
    text.append('[ ]: 95 % interval')
  return '\n'.join(text)


def in_columns(lines: list[list[str]]) -> list[str]:
  """Returns rows of equally many cells as lines: the first column to the left, others right."""
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  text = []
  for first, *rest in lines:
    cells = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))]
    text.append('   '.join(cells).rstrip())
  return text


def groups(summary: dict) -> list[tuple[str, dict[str, dict]]]:
  """Returns (title, {name: row}) for each group that has rows, rows in reading order.

  Raises:
    ValueError: if the summary has a group that is none of `GROUPS`.
  """
  unknown = sorted(set(summary) - set(GROUPS))
  if unknown:
    raise UserError(
      f'summary has the groups {unknown}; a report knows {list(GROUPS)}: rename or leave them out'
    )
  return [
    (title, dict(sorted(summary[group].items(), key=_reading_order)))
    for group, title in GROUPS.items()
    if summary.get(group)
  ]


def columns(summary: dict) -> list[str]:
  """Returns the keys that any row has: the known ones first, then others as they come.

  Intervals are no columns of their own: they stand in the cell of their rate.
  """
  rows = [row for _, rows in groups(summary) for row in rows.values()]
  given = dict.fromkeys(key for row in rows for key in row if not key.endswith('_interval'))
  return [key for key in HEADINGS if key in given] + [key for key in given if key not in HEADINGS]


def heading(key: str) -> str:
  """Returns the column's heading: `helpful_rate` -> `still answers`."""
  return HEADINGS.get(key, key.replace('_', ' '))


def cell(row: dict, key: str) -> str:
  """Returns one number as text with its interval: a rate in per cent, a count, a mean, or a dash.

  Raises:
    ValueError: if a rate is outside [0, 1] or an interval is not a pair (low, high) around it.
  """
  value = row.get(key)
  if value is None:
    return MISSING
  bounds = interval(row, key)
  if key.endswith('_rate'):
    text = f'{100 * share(value, key):.1f} %'
    return text + (f' [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]' if bounds else '')
  if isinstance(value, bool) or not isinstance(value, int | float):
    return str(value)
  if isinstance(value, int) and not bounds:
    return f'{value:,}'
  decimals = decimals_of(value)
  brackets = ', '.join(f'{bound:,.{decimals}f}' for bound in bounds or ())
  return f'{value:,.{decimals}f}' + (f' [{brackets}]' if bounds else '')


def decimals_of(value: float) -> int:
  """Returns how many decimals a measured number is shown with: one, and more below 1."""
  if not math.isfinite(value) or value == 0 or abs(value) >= 1:
    return 1
  return min(6, 2 - math.floor(math.log10(abs(value))))


def share(value: float, key: str) -> float:
  """Returns the value, checked to be a share.

  Raises:
    ValueError: if it is not in [0, 1].
  """
  if not (isinstance(value, int | float) and 0 <= value <= 1):
    raise UserError(f'{key} is {value!r}; a rate is a share in [0, 1], or left out if unknown')
  return value


def interval(row: dict, key: str) -> tuple[float, float] | None:
  """Returns (low, high) of a number, or None if the row gives none.

  Raises:
    ValueError: if what the row gives is not a pair of numbers, low first, and of shares for a rate.
  """
  given = row.get(f'{key}_interval')
  if given is None:
    return None
  if len(given) != 2 or given[0] > given[1]:
    raise UserError(f'{key}_interval is {given!r}; give [low, high], or leave it out')
  if key.endswith('_rate'):
    return share(given[0], f'{key}_interval'), share(given[1], f'{key}_interval')
  return given[0], given[1]


def round_number(stage: str) -> int | None:
  """Returns 0 for `initial`, n for `revision_n`, None for any other stage."""
  match = re.fullmatch(r'revision_(\d+)', stage)
  return 0 if stage == 'initial' else int(match[1]) if match else None


def aligned(cells: list[str]) -> list[str]:
  """Returns cells of equal width: numbers end, and brackets open, under each other."""
  halves = [text.partition(' [') for text in cells]
  left, right = (max(len(half[i]) for half in halves) for i in (0, 2))
  return [
    number.rjust(left) + ((gap + bounds).ljust(right + 2) if right else '')
    for number, gap, bounds in halves
  ]


def _reading_order(item: tuple[str, dict]) -> float:
  # JSON written with sorted keys puts `aligned` before `base` and `revision_10` before
  # `revision_2`; the sort is stable, so every other name keeps its given place after these.
  name = item[0]
  number = {'base': 0, 'aligned': 1}.get(name, round_number(name))
  return math.inf if number is None else number
