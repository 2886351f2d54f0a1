"""Shared parts of figures: axes, ticks, intervals and markers."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cai_jax.report.elements import printable
from cai_jax.report.palette import COLOURS
from cai_jax.report.svg import GID
from cai_jax.report.ticks import tick_labels

MARKERS = (('o', 8.0), ('s', 7.2), ('^', 9.0), ('D', 7.0))  # shape and size


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
  """Return a figure of the given size, in points, with one pair of axes."""
  figure = Figure(figsize=(width / 72, height / 72), layout='constrained')
  axes = figure.add_subplot()
  style_axes(axes)
  return figure, axes


def style_axes(axes: Axes) -> None:
  """Remove all spines but the bottom one, and draw short ticks on the x axis."""
  for side in ('left', 'right', 'top'):
    axes.spines[side].set_visible(False)
  axes.spines['bottom'].set_alpha(0.7)
  axes.tick_params(axis='x', length=4, pad=3)
  axes.tick_params(axis='y', length=0, pad=7)
  axes.set_axisbelow(True)


def label_axes(axes: Axes, x_label: str, y_label: str) -> None:
  """Label both axes."""
  axes.set_xlabel(printable(x_label))
  axes.set_ylabel(printable(y_label), rotation_mode='anchor')  # anchored for any font


def set_x_ticks(axes: Axes, ticks: Sequence[float]) -> None:
  """Set the ticks of the x axis, with labels and vertical grid lines.

  Args:
    axes: where to draw.
    ticks: positions of the ticks.
  """
  axes.set_xticks(ticks, tick_labels(ticks))
  axes.grid(axis='x', color='black', alpha=0.16, linewidth=1, gid=f'{GID}-xgrid')


def set_y_ticks(axes: Axes, ticks: Sequence[float]) -> None:
  """Set the ticks of the y axis, with labels and horizontal grid lines.

  Args:
    axes: where to draw.
    ticks: positions of the ticks.
  """
  axes.set_yticks(ticks, tick_labels(ticks))
  axes.grid(axis='y', color='black', alpha=0.16, linewidth=1, gid=f'{GID}-ygrid')


def draw_interval(
  axes: Axes, x: Sequence[float], y: Sequence[float], cap: str, colour: int
) -> None:
  """Draw a line between two points, with a cap at each.

  Args:
    axes: where to draw.
    x, y: two coordinates each.
    cap: '|' for a horizontal interval, '_' for a vertical one.
    colour: index into `COLOURS`.
  """
  axes.add_line(
    Line2D(
      x,
      y,
      color=COLOURS[colour],
      linewidth=1.4,
      marker=cap,
      markersize=8,
      markeredgewidth=1.4,
      clip_on=False,
      gid=f'{GID}-interval',
    )
  )


def draw_marker(
  axes: Axes, x: float, y: float, colour: int, title: str, titles: dict[str, str]
) -> None:
  """Draw a point, and add its hover title to `titles`.

  Args:
    axes: where to draw.
    x: horizontal coordinate.
    y: vertical coordinate.
    colour: index into `COLOURS`.
    title: the hover title.
    titles: the titles of a figure, by gid; extended in place.
  """
  shape, size = MARKERS[colour % len(MARKERS)]
  gid = f'{GID}-marker-{len(titles)}'
  titles[gid] = title
  axes.add_line(
    Line2D(
      [x],
      [y],
      linestyle='none',
      color=COLOURS[colour],
      marker=shape,
      markersize=size,
      markeredgewidth=0,
      clip_on=False,
      zorder=3,
      gid=gid,
    )
  )
