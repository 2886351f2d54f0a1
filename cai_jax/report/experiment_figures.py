"""Draw the figures that an experiment's results specify, for its page and as files."""

import math
import os
import pathlib
from typing import Any

from cai_jax.report.figure_data import Panel, Point, Series
from cai_jax.report.figures import arms_figure, frontier_figure, line_figure
from cai_jax.report.numbers import heading, interval
from cai_jax.report.palette import COLOURS
from cai_jax.report.results import check_results, group_title, number_row
from cai_jax.report.svg import Drawing, save_drawing
from cai_jax.report.ticks import nice_ticks
from cai_jax.runtime.errors import UserError, show
from cai_jax.runtime.files import make_folder

Results = dict[str, Any]  # as `cai_jax.report.results` describes
Spec = dict[str, Any]  # one of its figures


def write_figures(folder: str | os.PathLike, results: Results) -> list[pathlib.Path]:
  """Write each figure as `NAME_N.svg` and `NAME_N.pdf`, black on white, and return the paths.

  Args:
    folder: created if it does not exist.
    results: the results, as `cai_jax.report.results` describes. N counts the figures from 1.

  Raises:
    UserError: if the results are malformed.
  """
  check_results(results)
  name = results['name']
  is_file_name = name.isprintable() and pathlib.PurePath(name).name == name
  if not is_file_name or name in ('', '..') or '\\' in name:
    raise UserError(
      f'The name of the results is {show(name)}, but figures are files of that name. Choose a name '
      'without slashes and control characters.'
    )
  folder = make_folder(folder)
  paths = []
  for number, drawing in enumerate(draw_figures(results), 1):
    paths += save_drawing(drawing, folder / f'{name}_{number}')
  return paths


def draw_figures(results: Results) -> list[Drawing]:
  """Return the figures that the results specify.

  Args:
    results: the results, as `cai_jax.report.results` describes.

  Raises:
    UserError: if a figure shows an unknown arm or metric, or has nothing to show.
  """
  draw = {
    'line': _draw_lines,
    'arms': _draw_arms,
    'differences': _draw_differences,
    'frontier': _draw_frontier,
  }
  return [draw[spec['kind']](results, spec) for spec in results['figures']]


def _read_number(
  results: Results, spec: Spec, arm: str, group: str, metric: str
) -> tuple[float | None, tuple[float, float] | None]:
  """Return a value and its interval, in per cent for a rate, or None where the results have none.

  Raises:
    UserError: if there is no such arm or metric.
  """
  for name, names in ((arm, list(results['arms'])), (metric, results['metrics'])):
    if name not in names:
      raise UserError(
        f'The figure {spec["caption"]!r} shows {name!r}, which does not exist. Choose one of '
        f'{names}.'
      )
  row = number_row(results['arms'][arm]['groups'].get(group, {'metrics': {}}), metric)
  if row.get(metric) is None:
    return None, None
  unit = 100 if metric.endswith('_rate') else 1
  bounds = interval(row, metric)
  return unit * row[metric], (unit * bounds[0], unit * bounds[1]) if bounds else None


def _axis_label(metric: str) -> str:
  return heading(metric) + (' (%)' if metric.endswith('_rate') else '')


def _draw_lines(results: Results, spec: Spec) -> Drawing:
  series = []
  for colour, line in enumerate(spec['series']):
    numbers = [
      _read_number(results, spec, arm, spec['group'], line['metric']) for arm in line['arms']
    ]
    low, high = (
      tuple(bounds[side] if bounds else None for _, bounds in numbers)
      if any(bounds for _, bounds in numbers)
      else None
      for side in (0, 1)
    )
    y = tuple(math.nan if value is None else value for value, _ in numbers)
    series.append(Series(line['name'], tuple(line['x']), y, low, high, colour))
  y_range = None
  if all(line['metric'].endswith('_rate') for line in spec['series']):
    values = [
      v for s in series for v in (*s.y, *(s.high or ())) if v is not None and math.isfinite(v)
    ]
    y_range = (0, min(100, nice_ticks(0, max(values, default=0) or 1)[-1]))
  xs = sorted({x for s in series for x in s.x})
  gaps = [b - a for a, b in zip(xs, xs[1:], strict=False)]
  label_each_x = not gaps or min(gaps) * 16 >= xs[-1] - xs[0]
  return line_figure(
    series,
    spec['x_label'],
    spec['y_label'],
    description=spec['caption'],
    x_ticks=[(x, f'{x:g}') for x in xs] if label_each_x else None,
    y_range=y_range,
  )


def _draw_arms(results: Results, spec: Spec) -> Drawing:
  panels = []
  for i, metric in enumerate(spec['metrics']):
    numbers = [_read_number(results, spec, arm, spec['group'], metric) for arm in spec['arms']]
    low, high = (tuple(b[side] if b else None for _, b in numbers) for side in (0, 1))
    values = tuple(value for value, _ in numbers)
    present = [v for v in (*values, *low, *high) if v is not None]
    x_range = _rate_range(present) if present and metric.endswith('_rate') else None
    colour = i % len(COLOURS)
    panels.append(Panel(_axis_label(metric), values, low, high, colour, x_range))
  return arms_figure(spec['arms'], panels, description=spec['caption'])


def _draw_differences(results: Results, spec: Spec) -> Drawing:
  """Draw the paired differences of arms, those of rates in percentage points."""
  panels = []
  for i, metric in enumerate(spec['metrics']):
    unit = 100 if metric.endswith('_rate') else 1
    columns: list[tuple[float | None, float | None, float | None]] = []
    for arm in spec['arms']:
      _read_number(results, spec, arm, spec['group'], metric)  # checks the names
      group = results['arms'][arm]['groups'].get(spec['group'], {})
      number = group.get('differences', {}).get(metric)
      bounds = number['interval'] if number else None
      low, high = (unit * bounds[0], unit * bounds[1]) if bounds else (None, None)
      columns.append((unit * number['value'] if number else None, low, high))
    values, low, high = zip(*columns, strict=True)
    label = f'{heading(metric)}, difference' + (' (pp)' if unit == 100 else '')
    present = [value for column in columns for value in column if value is not None]
    ticks = nice_ticks(min([0, *present]), max([0, *present]), 4)  # the axis shows zero
    x_range = (ticks[0], ticks[-1]) if present else None
    panels.append(Panel(label, values, low, high, i % len(COLOURS), x_range))
  return arms_figure(spec['arms'], panels, description=spec['caption'])


def _rate_range(values: list[float]) -> tuple[float, float]:
  """Return the range of an axis for rates in per cent: from 0, unless all values are over 50."""
  bottom, top = min(values), max(values)
  ticks = nice_ticks(bottom if bottom > 50 else 0, top or 1, 4)
  return ticks[0], min(100, ticks[-1])


def _draw_frontier(results: Results, spec: Spec) -> Drawing:
  points = []
  for arm in spec['arms']:
    (x, x_bounds), (y, y_bounds) = (_read_number(results, spec, arm, *spec[axis]) for axis in 'xy')
    if x is None or y is None:
      raise UserError(
        f'The figure {spec["caption"]!r} cannot show the arm {arm!r}: its results lack '
        f'{spec["x"] if x is None else spec["y"]}. Leave the arm out of the figure.'
      )
    colour = 0 if arm == results['reference'] else 1
    points.append(Point(arm, x, y, x_bounds, y_bounds, colour))
  labels = [
    f'{_axis_label(metric)}, {group_title(group).lower()}'
    for group, metric in (spec['x'], spec['y'])
  ]
  return frontier_figure(points, *labels, description=spec['caption'])
