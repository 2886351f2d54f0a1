"""Draw the three kinds of figures: lines, arms with intervals, and named points on two axes.

Besides its colour, each series has its own marker and dashes, so that a figure can be read in black
and white.
"""

import itertools
import math
import textwrap
from collections.abc import Sequence
from typing import Any, TypeGuard

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.transforms import IdentityTransform

from cai_jax.report.artists import (
  MARKERS,
  draw_interval,
  draw_marker,
  label_axes,
  new_figure,
  set_x_ticks,
  set_y_ticks,
  style_axes,
)
from cai_jax.report.elements import printable
from cai_jax.report.figure_data import MAX_MARKERS, Panel, Point, Series
from cai_jax.report.label_placement import nearest_point, place_box
from cai_jax.report.palette import COLOURS
from cai_jax.report.svg import FONT_SIZE, GID, Drawing, figure_settings
from cai_jax.report.ticks import inner_ticks, nice_ticks, thin
from cai_jax.runtime.errors import UserError

DASHES: tuple[tuple[int, ...], ...] = ((), (7, 4), (2, 3), (9, 3, 2, 3), (4, 2), (1, 4))
WIDTH, HEIGHT = 480, 300  # of a figure in points; the page scales it
WIDE = 640  # width of a figure with several panels
CHARACTER = 0.62 * FONT_SIZE  # approximate width of a character
ROW_HEIGHT = 24  # of an arm
LINE_HEIGHT = 15  # of an arm's name
MAX_INTERVALS = 400  # lines with more points are drawn without them, since they would overlap
NAME_LENGTH = 34  # characters of an arm's name on one line
PANEL_WIDTH = 190  # least width of a panel
LEADER_DISTANCE = 12  # from which a name has a line to its point


def line_figure(
  series: Sequence[Series],
  x_label: str,
  y_label: str,
  *,
  description: str,
  x_ticks: Sequence[tuple[float, str]] | None = None,
  y_range: tuple[float, float] | None = None,
  size: tuple[float, float] = (WIDTH, HEIGHT),
  legend: bool = True,
) -> Drawing:
  """Draw lines with intervals, axes and a legend.

  Args:
    series: the lines; at least one has a finite point.
    x_label: what the x axis shows, with its unit.
    y_label: what the y axis shows, with its unit.
    description: one sentence for readers who cannot see the figure.
    x_ticks: (position, label) pairs; by default round numbers.
    y_range: (low, high) of the y axis; by default round numbers around all values and intervals.
    size: width and height in points.
    legend: whether the names of several series stand above the axes.

  Raises:
    UserError: if no series has a finite point.
  """
  points = [(x, y) for s in series for x, y in zip(s.x, s.y, strict=True) if math.isfinite(y)]
  if not points:
    raise UserError(f'Figure {description!r} has no finite point. Leave it out.')
  xs = [x for x, _ in points]
  bounds = [b for s in series for b in (*(s.low or ()), *(s.high or ())) if _is_finite(b)]
  ys = [y for _, y in points] + bounds
  x_ticks = x_ticks or inner_ticks(min(xs), max(xs))
  x_low, x_high = min([*xs, *(x for x, _ in x_ticks)]), max([*xs, *(x for x, _ in x_ticks)])
  if x_low == x_high:
    x_low, x_high = x_low - 0.5, x_high + 0.5
  y_ticks = nice_ticks(*(y_range or (min(ys), max(ys))))
  with figure_settings():
    figure, axes = new_figure(*size)
    label_axes(axes, x_label, y_label)
    axes.set_xticks([x for x, _ in x_ticks], [printable(label) for _, label in x_ticks])
    set_y_ticks(axes, y_ticks)
    axes.set_ylim(*(y_range or (y_ticks[0], y_ticks[-1])))
    is_sparse = len(x_ticks) <= 12 and max(len(s.x) for s in series) <= MAX_MARKERS
    margin = 0.04 * (x_high - x_low) if is_sparse else 0.0
    axes.set_xlim(x_low - margin, x_high + margin)
    titles: dict[str, str] = {}
    for s in series:
      _draw_series(axes, s, x_label, titles)
    if legend and len(series) > 1:
      _add_legend(figure, series)
  return Drawing(figure, description, titles)


def arms_figure(names: Sequence[str], panels: Sequence[Panel], *, description: str) -> Drawing:
  """Draw dots with intervals: one row per arm, and one panel per quantity.

  Args:
    names: names of the arms, from top to bottom; long names take several lines.
    panels: the panels from left to right, each with one value per name.
    description: one sentence for readers who cannot see the figure.

  Raises:
    UserError: if a panel has no finite value, or does not have one value per name.
  """
  for panel in panels:
    if len(panel.values) != len(names):
      raise UserError(
        f'Panel {panel.label!r} has {len(panel.values)} values for {len(names)} arms. Give one '
        'value per arm.'
      )
    if not any(map(_is_finite, panel.values)):
      raise UserError(
        f'Panel {panel.label!r} of figure {description!r} has no value. Leave it out.'
      )
  lines = [textwrap.wrap(printable(name), NAME_LENGTH) or [''] for name in names]
  heights = [max(ROW_HEIGHT, LINE_HEIGHT * len(name) + 8) for name in lines]
  ends = itertools.accumulate(heights)
  rows = [end - height / 2 for end, height in zip(ends, heights, strict=True)]
  name_width = 14 + CHARACTER * max(len(line) for name in lines for line in name)
  label_width = CHARACTER * max(len(panel.label) for panel in panels)
  width = WIDTH if len(panels) == 1 else WIDE
  panel_width = max((width - name_width) / len(panels), label_width, PANEL_WIDTH)
  with figure_settings():
    size = name_width + panel_width * len(panels), sum(heights) + 60
    layout = ConstrainedLayoutEngine(wspace=0.08)
    figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout=layout)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    titles: dict[str, str] = {}
    for axes, panel in zip(all_axes, panels, strict=True):
      style_axes(axes)
      axes.set_ylim(sum(heights), 0)
      axes.set_yticks([])
      _draw_panel(axes, panel, names, rows, titles)
    _draw_names(all_axes[0], lines, rows)
  return Drawing(figure, description, titles)


def frontier_figure(
  points: Sequence[Point], x_label: str, y_label: str, *, description: str
) -> Drawing:
  """Draw a named point per arm, with intervals along both axes.

  A name is placed next to its point if there is space. Otherwise a short line connects them.

  Args:
    points: the arms, each a point.
    x_label: what the x axis shows, with its unit.
    y_label: what the y axis shows, with its unit.
    description: one sentence for readers who cannot see the figure.

  Raises:
    UserError: if there is no point, or one is not finite.
  """
  if not points or not all(math.isfinite(v) for p in points for v in (p.x, p.y)):
    raise UserError(
      f'Figure {description!r} has no point, or one that is not finite. Leave it out.'
    )
  x_ticks = nice_ticks(*_extent([(p.x, p.x_bounds) for p in points]))
  y_ticks = nice_ticks(*_extent([(p.y, p.y_bounds) for p in points]))
  titles: dict[str, str] = {}
  with figure_settings():
    figure, axes = new_figure(WIDTH, HEIGHT + 70)
    label_axes(axes, x_label, y_label)
    set_x_ticks(axes, x_ticks)
    set_y_ticks(axes, y_ticks)
    axes.set_xlim(x_ticks[0], x_ticks[-1])
    axes.set_ylim(y_ticks[0], y_ticks[-1])
    for p in points:
      if p.x_bounds:
        draw_interval(axes, p.x_bounds, (p.y, p.y), '|', p.colour)
      if p.y_bounds:
        draw_interval(axes, (p.x, p.x), p.y_bounds, '_', p.colour)
      title = f'{p.name}: {x_label} {p.x:.4g}, {y_label} {p.y:.4g}'
      draw_marker(axes, p.x, p.y, p.colour, title, titles)
    figure.draw_without_rendering()  # lays the axes out, so that names can be placed
    figure.set_layout_engine('none')
    _name_points(figure, axes, points)
  return Drawing(figure, description, titles)


def _draw_series(axes: Axes, s: Series, x_label: str, titles: dict[str, str]) -> None:
  colour = COLOURS[s.colour]
  bounds = zip(s.x, s.low or (), s.high or (), strict=False)
  for x, low, high in bounds if len(s.x) <= MAX_INTERVALS else ():
    if _is_finite(low) and _is_finite(high):
      draw_interval(axes, (x, x), (low, high), '_', s.colour)
  for run in _finite_runs(s):
    xs, ys = thin([x for x, _ in run], [y for _, y in run])
    line = Line2D(xs, ys, color=colour, gid=f'{GID}-line', clip_on=False, **_line_style(s))
    axes.add_line(line)
    if s.has_markers:
      for x, y in run:
        draw_marker(axes, x, y, s.colour, f'{s.name}, {x_label} {x:g}: {y:.4g}', titles)


def _line_style(s: Series) -> dict[str, Any]:
  if s.faint:
    return {'linewidth': 1, 'alpha': 0.4}
  dashes = DASHES[s.colour] if s.has_markers else ()
  return {'linewidth': 2, 'linestyle': (0, dashes) if dashes else '-'}


def _finite_runs(s: Series) -> list[list[tuple[float, float]]]:
  """Return the points of a series, split at values that are not finite."""
  runs: list[list[tuple[float, float]]] = [[]]
  for x, y in zip(s.x, s.y, strict=True):
    if math.isfinite(y):
      runs[-1].append((x, y))
    elif runs[-1]:
      runs.append([])
  return [run for run in runs if run]


def _add_legend(figure: Figure, series: Sequence[Series]) -> None:
  """Add a legend above the axes, with as many columns as fit."""
  handles = []
  for s in series:
    shape, size = MARKERS[s.colour % len(MARKERS)]
    marker: dict[str, Any] = {}
    if s.has_markers:
      marker = {'marker': shape, 'markersize': size, 'markeredgewidth': 0}
    label = '\n'.join(textwrap.wrap(printable(s.name), 60))
    handles.append(Line2D([], [], color=COLOURS[s.colour], label=label, **_line_style(s), **marker))
  for columns in range(len(series), 0, -1):
    legend = figure.legend(
      handles=handles,
      loc='outside upper left',
      ncols=columns,
      frameon=False,
      borderaxespad=0,
      handlelength=1.9,
      columnspacing=1.5,
    )
    if legend.get_window_extent().width <= WIDTH or columns == 1:
      break
    legend.remove()
  rows = math.ceil(len(series) / columns)
  figure.set_size_inches(WIDTH / 72, (HEIGHT + 20 * (rows - 1)) / 72)


def _draw_panel(
  axes: Axes, panel: Panel, names: Sequence[str], rows: Sequence[float], titles: dict[str, str]
) -> None:
  values = [v for v in (*panel.values, *panel.low, *panel.high) if _is_finite(v)]
  low, high = panel.x_range or (min(values), max(values))
  ticks = nice_ticks(low, high, 4)
  if panel.x_range:
    ticks = [tick for tick in ticks if low <= tick <= high * (1 + 1e-9)]
  else:
    low, high = ticks[0], ticks[-1]
  margin = 0.05 * (high - low)
  axes.set_xlim(low - margin, high + margin)
  set_x_ticks(axes, ticks)
  axes.set_title(printable(panel.label), fontsize=FONT_SIZE, fontweight='bold')
  for name, row, x, low_bound, high_bound in zip(
    names, rows, panel.values, panel.low, panel.high, strict=True
  ):
    if not _is_finite(x):
      axes.text(low, row, '–', ha='center', va='center')
      continue
    if _is_finite(low_bound) and _is_finite(high_bound):
      draw_interval(axes, (low_bound, high_bound), (row, row), '|', panel.colour)
    draw_marker(axes, x, row, panel.colour, f'{name}, {panel.label}: {x:.4g}', titles)


def _draw_names(axes: Axes, lines: Sequence[Sequence[str]], rows: Sequence[float]) -> None:
  """Write the names of the arms to the left of the axes, line by line."""
  for name, row in zip(lines, rows, strict=True):
    for i, line in enumerate(name):
      offset = LINE_HEIGHT * ((len(name) - 1) / 2 - i) - 4  # from the row to the baseline
      axes.annotate(
        line,
        (0, row),
        (-12, offset),
        xycoords=('axes fraction', 'data'),
        textcoords='offset points',
        ha='right',
        va='baseline',
        annotation_clip=False,
      )


def _name_points(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
  """Write the name of each point where it covers neither points and intervals nor other names."""
  to_display = axes.transData.transform
  places = [tuple(map(float, to_display((p.x, p.y)))) for p in points]
  taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in places]
  for p, (x, y) in zip(points, places, strict=True):
    if p.x_bounds:
      low, high = (float(to_display((bound, p.y))[0]) for bound in p.x_bounds)
      taken.append((low - 3, y - 5, high + 3, y + 5))
    if p.y_bounds:
      low, high = (float(to_display((p.x, bound))[1]) for bound in p.y_bounds)
      taken.append((x - 5, low - 3, x + 5, high + 3))
  extent = axes.get_window_extent()
  frame = (extent.x0, extent.y0, extent.x1, extent.y1)
  for p, (x, y) in zip(points, places, strict=True):
    name = figure.text(0, 0, printable(p.name), transform=IdentityTransform(), va='baseline')
    width = name.get_window_extent().width
    box = place_box(x, y, width, FONT_SIZE + 3, taken, frame)
    taken.append(box)
    near = nearest_point(box, x, y)
    if math.dist(near, (x, y)) > LEADER_DISTANCE:
      ends = zip((x, y), near, strict=True)
      figure.add_artist(
        # Below the intervals, so that it does not look like one.
        Line2D(
          *ends, color='black', alpha=0.45, linewidth=1, transform=IdentityTransform(), zorder=0
        )
      )
    # Anchored at the side of the point, so that the name stays there in a narrower font.
    if near[0] == box[0]:
      name.set(x=box[0] + 2, ha='left')
    elif near[0] == box[2]:
      name.set(x=box[2] - 2, ha='right')
    else:
      name.set(x=(box[0] + box[2]) / 2, ha='center')
    name.set_y(box[1] + 4)


def _extent(values: Sequence[tuple[float, tuple[float, float] | None]]) -> tuple[float, float]:
  finite = [v for value, bounds in values for v in (value, *(bounds or ())) if _is_finite(v)]
  return min(finite), max(finite)


def _is_finite(value: float | None) -> TypeGuard[float]:
  return value is not None and math.isfinite(value)
