"""Plain-text tables of a run's summary and of an experiment's results, in aligned columns."""

import textwrap
from typing import Any

from cai_jax.report import results as experiment_results
from cai_jax.report.elements import format_value
from cai_jax.report.numbers import (
  GROUPS,
  MISSING,
  cell,
  columns,
  describe_difference,
  groups,
  heading,
)

WIDTH = 100  # characters of a line, if no single column is wider


def summary_table(summary: dict[str, Any]) -> str:
  """Return the summary of a run as text, with 95 % intervals in brackets.

  Args:
    summary: the summary, as `cai_jax.report.numbers` describes.

  Raises:
    UserError: if the summary is malformed.
  """
  keys = columns(summary)
  blocks = groups(summary)
  if not blocks:
    return 'Nothing was evaluated in this run.'
  rows = [row for _, named_rows in blocks for row in named_rows.values()]
  cells = {key: _align_cells([cell(row, key) for row in rows]) for key in keys}
  names = ['  ' + name for _, named_rows in blocks for name in named_rows]
  width = max(map(len, [*names, *(title for title, _ in blocks)]))
  parts: list[list[str]] = [[]]
  for key in keys:
    taken = sum(3 + _column_width(other, cells[other]) for other in parts[-1])
    if parts[-1] and width + taken + 3 + _column_width(key, cells[key]) > WIDTH:
      parts.append([])
    parts[-1].append(key)
  text: list[str] = []
  for part in parts:
    text += [''] * bool(text) + _join_columns(_summary_lines(blocks, part, cells))
  if any('[' in line for line in text):
    text.append('[ ]: 95 % interval')
  return '\n'.join([*text, *_difference_lines(summary)])


def _summary_lines(
  blocks: list[tuple[str, dict[str, Any]]], keys: list[str], cells: dict[str, list[str]]
) -> list[list[str]]:
  """Return the cells of a table with some of the columns, line by line."""
  lines, number = [['', *(heading(key) for key in keys)]], 0
  for title, named_rows in blocks:
    lines.append([title] + [''] * len(keys))
    for name in named_rows:
      lines.append(['  ' + name, *(cells[key][number] for key in keys)])
      number += 1
  return lines


def _column_width(key: str, cells: list[str]) -> int:
  return max(map(len, [heading(key), *cells]))


def _difference_lines(summary: dict[str, Any]) -> list[str]:
  """Return the paired differences of a summary as lines: each pair of rows, then its columns."""
  lines = []
  for group, title in GROUPS.items():
    found = (summary.get('differences') or {}).get(group, ())
    pairs = dict.fromkeys((d['row'], d['reference']) for d in found)
    for row, reference in pairs:
      lines.append(f'{title}: {row} - {reference}')
      items = [
        f'{heading(d["column"])} {describe_difference(d)}' + '*' * (d['holm'] < 0.05)
        for d in found
        if (d['row'], d['reference']) == (row, reference)
      ]
      lines += textwrap.wrap(
        '; '.join(item.replace(' ', '\0') for item in items),
        WIDTH,
        initial_indent='  ',
        subsequent_indent='  ',
      )
  if not lines:
    return []
  note = (
    'Differences, paired by prompt, with 95 % intervals (rates in percentage points; *: p < 0.05 '
    "after Holm's correction)"
  )
  return ['', *textwrap.wrap(note, WIDTH), *(line.replace('\0', ' ') for line in lines)]


def experiment_table(results: dict[str, Any]) -> str:
  """Return an experiment's arms as text, with their numbers and paired differences.

  Args:
    results: the results, as `cai_jax.report.results` describes.

  Raises:
    UserError: if the results are malformed.
  """
  experiment_results.check_results(results)
  facts, metrics = experiment_results.fact_names(results), results['metrics']
  blocks = experiment_results.rows_by_group(results)
  lines = [['', *facts, 'count']]
  rows = [(name, row) for _, named_rows in blocks for name, row in named_rows.items()]
  compared = {metric for _, row in rows for metric in row.get('differences', {})}
  for metric in metrics:
    lines[0] += [heading(metric)] + ['difference'] * (metric in compared)
  columns = [
    [format_value(results['arms'][name]['facts'].get(fact, MISSING)) for name, _ in rows]
    for fact in facts
  ]
  columns.append([f'{row["count"]:,}' for _, row in rows])
  for metric in metrics:
    values = [cell(experiment_results.number_row(row, metric), metric) for _, row in rows]
    differences = [experiment_results.format_difference(row, metric, '*') for _, row in rows]
    columns += [_align_cells(values)] + [_align_cells(differences)] * (metric in compared)
  cells = list(zip(*columns, strict=True))
  for group, named_rows in blocks:
    lines.append([experiment_results.group_title(group)] + [''] * len(columns))
    lines += [['  ' + name, *cells.pop(0)] for name in named_rows]
  text = _join_columns(lines)
  text.append(
    f'[ ]: 95 % interval; difference: paired, to {results["reference"]!r}, of rates in percentage '
    'points; *: the interval excludes zero'
  )
  return '\n'.join(text)


def _join_columns(rows: list[list[str]]) -> list[str]:
  """Return one line per row, with the first column left-aligned and the others right-aligned."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for first, *rest in rows:
    cells = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))]
    lines.append('   '.join(cells).rstrip())
  return lines


def _align_cells(cells: list[str]) -> list[str]:
  """Pad cells to one width so that the numbers end, and the brackets start, at the same column."""
  halves = [text.partition(' [') for text in cells]
  left, right = (max(len(half[i]) for half in halves) for i in (0, 2))
  return [
    number.rjust(left) + ((gap + bounds).ljust(right + 2) if right else '')
    for number, gap, bounds in halves
  ]
