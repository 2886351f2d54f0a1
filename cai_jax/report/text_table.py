"""Plain-text tables of a run's summary and of an experiment's results, in aligned columns."""

import itertools
from typing import Any

from cai_jax.report import results as experiment_results
from cai_jax.report.differences import (
  PROMPT_INTERVALS,
  SEED_INTERVALS,
  difference_direction,
  difference_text,
  explain_marks,
)
from cai_jax.report.elements import format_value
from cai_jax.report.numbers import MISSING, cell, columns, groups, heading

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
  text = _block_table('', [(title, list(named)) for title, named in blocks], cells)
  compared = [key for key in keys if any(difference_text(row, key) for row in rows)]
  if compared:
    text += ['', *_difference_lines(blocks, compared)]
  if any('[' in line for line in text):
    text.append(f'[ ]: {PROMPT_INTERVALS}')
  if compared:
    is_table = any(line.endswith(' *') for line in text)
    text.append(explain_marks(rows, *2 * ['*' if is_table else 'significant']))
  return '\n'.join(text)


def _difference_lines(
  blocks: list[tuple[str, dict[str, dict[str, Any]]]], keys: list[str]
) -> list[str]:
  """Return lines with the paired difference of each row to the one that it is compared with.

  If they do not fit into one table, the lines list the marked differences only.
  """
  rows = [row for _, named in blocks for row in named.values() if row.get('differences')]
  cells = {key: _align_cells([difference_text(row, key) for row in rows]) for key in keys}
  compared = []
  for title, named_rows in blocks:
    labels = []
    for name, row in named_rows.items():
      if row.get('differences'):
        other = next(number['to'] for number in row['differences'].values())
        labels.append(f'{name} − {other}')
    compared += [(title, labels)] if labels else []
  corner = 'paired differences, of rates in percentage points'
  width = max(len(corner), *(len(label) + 2 for _, labels in compared for label in labels))
  if width + sum(3 + _column_width(key, cells[key]) for key in keys) <= WIDTH:
    return _block_table(corner, compared, cells)
  return _marked_lines(blocks, keys)


def _marked_lines(
  blocks: list[tuple[str, dict[str, dict[str, Any]]]], keys: list[str]
) -> list[str]:
  """Return one line for each marked difference, after a line with their number."""
  found, count = [], 0
  for title, named_rows in blocks:
    for name, row in named_rows.items():
      for key in keys:
        text, number = difference_text(row, key), row.get('differences', {}).get(key)
        count += bool(text)
        if text and difference_direction(number):
          label = f'  {name} − {number["to"]}'
          found.append((title, [label, heading(key), text.removesuffix(' *')]))
  head = f'{len(found)} of {count} paired differences are significant'
  if not found:
    return [f'{head}. The report lists all of them.']
  lines, cells = [f'{head}; the report lists all of them:'], [cell for _, cell in found]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  for title, group in itertools.groupby(found, key=lambda item: item[0]):
    lines.append(title)
    for _, line in group:
      padded = [text.ljust(width) for text, width in zip(line, widths, strict=True)]
      lines.append('   '.join(padded).rstrip())
  return lines


def _block_table(
  corner: str, blocks: list[tuple[str, list[str]]], cells: dict[str, list[str]]
) -> list[str]:
  """Return the lines of a table; if it is wider than `WIDTH`, of several with some columns each.

  Args:
    corner: the heading of the column of labels.
    blocks: the title of each block of rows, and the rows' labels.
    cells: the cells of each column, over all rows of all blocks.
  """
  labels = [corner, *(title for title, _ in blocks)]
  labels += ['  ' + label for _, block in blocks for label in block]
  width = max(map(len, labels))
  parts: list[list[str]] = [[]]
  for key in cells:
    taken = sum(3 + _column_width(other, cells[other]) for other in parts[-1])
    if parts[-1] and width + taken + 3 + _column_width(key, cells[key]) > WIDTH:
      parts.append([])
    parts[-1].append(key)
  text: list[str] = []
  for part in parts:
    lines, number = [[corner, *map(heading, part)]], 0
    for title, block in blocks:
      lines.append([title] + [''] * len(part))
      for label in block:
        lines.append(['  ' + label, *(cells[key][number] for key in part)])
        number += 1
    text += [''] * bool(text) + _join_columns(lines)
  return text


def _column_width(key: str, cells: list[str]) -> int:
  return max(map(len, [heading(key), *cells]))


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
    differences = [difference_text(row, metric) for _, row in rows]
    columns += [_align_cells(values)] + [_align_cells(differences)] * (metric in compared)
  cells = list(zip(*columns, strict=True))
  for group, named_rows in blocks:
    lines.append([experiment_results.group_title(group)] + [''] * len(columns))
    lines += [['  ' + name, *cells.pop(0)] for name in named_rows]
  text = _join_columns(lines)
  comparison = experiment_results.describe_comparison(results)
  footer = f'[ ]: {SEED_INTERVALS}; difference: paired, {comparison}, of rates in percentage points'
  text.append(f'{footer}; {explain_marks([row for _, row in rows], "*", "*")}')
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
