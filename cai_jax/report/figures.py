"""Figures as SVG text, for a page that stands on nothing but itself, and as files.

Colours are from Okabe and Ito's set, which readers with any colour vision tell apart; each series
also has a marker and a dash of its own, so that a figure survives a black-and-white print. Text and
axes take the page's colour (`currentColor`), and the classes `c0`, `c1`, ... let a page's style
sheet choose other colours on a dark ground.
"""

import dataclasses
import math
import re
import textwrap

from cai_jax.report.elements import escape
from cai_jax.report.palette import COLOURS
from cai_jax.runtime.errors import UserError

DASHES = ('', '7 4', '2 3', '9 3 2 3', '4 2', '1 4')
GRID = 'stroke="currentColor" stroke-opacity="0.16"'
FONT = 12
CHARACTER = 0.56 * FONT  # mean width of a character in a sans-serif face
WIDTH, HEIGHT = 480, 300  # of a drawing, in its own units; the page scales it
MARKED = 40  # points a series may have before its markers would touch
ROW = 24  # height of an arm's row
LABEL = 34  # characters of an arm's name on one line
TYPEFACE = 'Helvetica, Arial, Liberation Sans, DejaVu Sans, sans-serif'  # of a figure in a file


@dataclasses.dataclass(frozen=True)
class Series:
  """One line: values y at positions x, with an optional interval around each.

  A y that is not finite is a gap in the line. `colour` is an index into `COLOURS`. A `faint` line
  is drawn thin and pale, as the raw values behind a running mean.

  Raises:
    ValueError: if the lengths differ or the colour is unknown.
  """

  name: str
  x: tuple[float, ...]
  y: tuple[float, ...]
  low: tuple[float | None, ...] | None = None
  high: tuple[float | None, ...] | None = None
  colour: int = 0
  faint: bool = False

  def __post_init__(self):
    for name in ('y', 'low', 'high'):
      values = getattr(self, name)
      if values is not None and len(values) != len(self.x):
        raise UserError(
          f'series {self.name!r} has {len(self.x)} x and {len(values)} {name}; give as many of each'
        )
    if (self.low is None) != (self.high is None):
      raise UserError(f'series {self.name!r} has one of low and high; give both or neither')
    if self.colour not in range(len(COLOURS)):
      raise UserError(f'series {self.name!r}: colour {self.colour} is not in 0..{len(COLOURS) - 1}')


@dataclasses.dataclass(frozen=True)
class Panel:
  """One measured quantity of several arms: a value each, None where an arm has none.

  `low` and `high` bound the values as far as they are known. `colour` is an index into `COLOURS`.

  Raises:
    ValueError: if the lengths differ or the colour is unknown.
  """

  label: str
  values: tuple[float | None, ...]
  low: tuple[float | None, ...]
  high: tuple[float | None, ...]
  colour: int = 0
  x_range: tuple[float, float] | None = None

  def __post_init__(self):
    lengths = {len(self.values), len(self.low), len(self.high)}
    if len(lengths) != 1:
      raise UserError(f'panel {self.label!r} has {sorted(lengths)} numbers; give as many of each')
    if self.colour not in range(len(COLOURS)):
      raise UserError(f'panel {self.label!r}: colour {self.colour} is not 0..{len(COLOURS) - 1}')


@dataclasses.dataclass(frozen=True)
class Point:
  """One named arm where two quantities cross, with the bounds of each as far as they are known."""

  name: str
  x: float
  y: float
  x_bounds: tuple[float, float] | None = None
  y_bounds: tuple[float, float] | None = None
  colour: int = 1


def line_figure(
  series: list[Series],
  x_label: str,
  y_label: str,
  *,
  description: str,
  x_ticks: list[tuple[float, str]] | None = None,
  y_range: tuple[float, float] | None = None,
) -> str:
  """Returns a well-formed `<svg>` element with axes, units, legend, lines and intervals.

  Args:
    series: the lines; at least one finite point among them.
    x_label: what the x axis shows, with its unit.
    y_label: likewise for y.
    description: one sentence for readers who do not see the figure.
    x_ticks: (position, label) pairs; by default round numbers.
    y_range: (low, high) of the y axis; by default round numbers around all values and intervals.

  Raises:
    ValueError: if no series has a finite point.
  """
  points = [(x, y) for s in series for x, y in zip(s.x, s.y, strict=True) if math.isfinite(y)]
  if not points:
    raise UserError(f'figure {description!r} has no finite point; leave it out')
  xs = [x for x, _ in points]
  ys = [y for _, y in points] + [
    bound for s in series for bound in (*(s.low or ()), *(s.high or ())) if _finite(bound)
  ]
  y_ticks = nice_ticks(*(y_range or (min(ys), max(ys))))
  y_low, y_high = y_range or (y_ticks[0], y_ticks[-1])
  y_names = tick_labels(y_ticks)
  x_ticks = x_ticks or _inner_ticks(min(xs), max(xs))
  x_low = min([*xs, *(x for x, _ in x_ticks)])
  x_high = max([*xs, *(x for x, _ in x_ticks)])
  if x_low == x_high:
    x_low, x_high = x_low - 0.5, x_high + 0.5

  legend = len(series) > 1
  left = 30 + CHARACTER * max(map(len, y_names))
  right = WIDTH - 16
  named = _legend(series, left, right) if legend else ([], 0)
  top = 14 + 20 * named[1]
  height = HEIGHT + 20 * max(0, named[1] - 1)
  bottom = height - 46
  pad = 16 if len(x_ticks) <= 12 and max(len(s.x) for s in series) <= MARKED else 0

  def px(x):
    return left + pad + (x - x_low) / (x_high - x_low) * (right - left - 2 * pad)

  def py(y):
    return bottom - (y - y_low) / (y_high - y_low) * (bottom - top)

  parts = [_opened(WIDTH, height, description)]
  for y, label in zip(y_ticks, y_names, strict=True):
    parts.append(_line(left, py(y), right, py(y), GRID))
    parts.append(_text(left - 7, py(y) + 4, label, 'end'))
  parts += _x_axis(left, right, bottom, [(px(x), label) for x, label in x_ticks])
  parts += _axis_labels(left, right, top, bottom, height, x_label, y_label)
  parts += named[0]
  for s in series:
    parts.append(_drawn(s, px, py, x_label))
  return ''.join(parts) + '</svg>'


def arms_figure(names: list[str], panels: list[Panel], *, description: str) -> str:
  """Returns an `<svg>` with a row for each arm and a panel for each quantity: dots with intervals.

  Args:
    names: the arms, from top to bottom; long ones are set in several lines.
    panels: from left to right, each with as many values as there are names.
    description: one sentence for readers who do not see the figure.

  Raises:
    ValueError: if a panel has no finite value or another number of values than there are names.
  """
  for panel in panels:
    if len(panel.values) != len(names):
      raise UserError(
        f'panel {panel.label!r} has {len(panel.values)} values for {len(names)} arms; give one each'
      )
    if not any(map(_finite, panel.values)):
      raise UserError(f'panel {panel.label!r} of figure {description!r} has no value; leave it out')
  lines = [textwrap.wrap(name, LABEL) or [''] for name in names]
  column = 14 + CHARACTER * max(len(line) for name in lines for line in name)
  heights = [max(ROW, 15 * len(name) + 8) for name in lines]
  top = 26
  middles = [top + sum(heights[:i]) + height / 2 for i, height in enumerate(heights)]
  bottom = top + sum(heights)
  width = max((WIDTH - column) / len(panels), *(CHARACTER * len(p.label) for p in panels), 190)
  total = column + width * len(panels)
  parts = [_opened(total, bottom + 28, description)]
  for name, middle in zip(lines, middles, strict=True):
    start = middle + 4 - 7.5 * (len(name) - 1)
    parts += [_text(column - 12, start + 15 * i, line, 'end') for i, line in enumerate(name)]
  for i, panel in enumerate(panels):
    left = column + i * width
    parts.append(_panel(panel, names, middles, left, left + width - 26, top, bottom))
  return ''.join(parts) + '</svg>'


def _panel(panel, names, middles, left, right, top, bottom) -> str:
  known = [v for v in (*panel.values, *panel.low, *panel.high) if _finite(v)]
  low, high = panel.x_range or (min(known), max(known))
  ticks = nice_ticks(low, high, 4)
  if panel.x_range:
    ticks = [tick for tick in ticks if low <= tick <= high * (1 + 1e-9)]
  else:
    low, high = ticks[0], ticks[-1]

  def px(x):
    return left + 8 + (x - low) / (high - low) * (right - left - 16)

  parts = [_text((left + right) / 2, 14, panel.label, 'middle', 'font-weight="600"')]
  for tick in ticks:
    parts.append(_line(px(tick), top, px(tick), bottom, GRID))
  named = zip(ticks, tick_labels(ticks), strict=True)
  parts += _x_axis(left, right, bottom, [(px(tick), label) for tick, label in named])
  for name, y, x, *bounds in zip(names, middles, panel.values, panel.low, panel.high, strict=True):
    if not _finite(x):
      parts.append(_text(left + 8, y + 4, '–', 'middle'))
      continue
    if all(map(_finite, bounds)):
      parts.append(_span(px(bounds[0]), px(bounds[1]), y, panel.colour))
    parts.append(_marker(px(x), y, panel.colour, f'{name}, {panel.label}: {x:.4g}'))
  return '<g>' + ''.join(parts) + '</g>'


def frontier_figure(points: list[Point], x_label: str, y_label: str, *, description: str) -> str:
  """Returns an `<svg>` with a named point for each arm and its intervals both ways.

  Args:
    points: the arms; names stand beside their points where there is room, else at a short line.
    x_label: what the x axis shows, with its unit.
    y_label: likewise for y.
    description: one sentence for readers who do not see the figure.

  Raises:
    ValueError: if there is no point or one is not finite.
  """
  if not points or not all(map(math.isfinite, [v for p in points for v in (p.x, p.y)])):
    raise UserError(f'figure {description!r} has no point or one not finite; leave it out')
  width, height = WIDTH, HEIGHT + 70
  x_ticks = nice_ticks(*_extent([(p.x, p.x_bounds) for p in points]))
  y_ticks = nice_ticks(*_extent([(p.y, p.y_bounds) for p in points]))
  y_names = tick_labels(y_ticks)
  left, right = 30 + CHARACTER * max(map(len, y_names)), width - 16
  top, bottom = 14, height - 46

  def px(x):
    return left + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (right - left)

  def py(y):
    return bottom - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (bottom - top)

  parts = [_opened(width, height, description)]
  for y, label in zip(y_ticks, y_names, strict=True):
    parts.append(_line(left, py(y), right, py(y), GRID))
    parts.append(_text(left - 7, py(y) + 4, label, 'end'))
  parts += [_line(px(x), top, px(x), bottom, GRID) for x in x_ticks]
  x_named = zip(map(px, x_ticks), tick_labels(x_ticks), strict=True)
  parts += _x_axis(left, right, bottom, list(x_named))
  parts += _axis_labels(left, right, top, bottom, height, x_label, y_label)
  whiskers, markers, taken = [], [], []
  for p in points:
    x, y = px(p.x), py(p.y)
    markers.append(_marker(x, y, p.colour, f'{p.name}: {x_label} {p.x:.4g}, {y_label} {p.y:.4g}'))
    taken.append((x - 6, y - 6, x + 6, y + 6))
    if p.x_bounds:
      low, high = map(px, p.x_bounds)
      whiskers.append(_span(low, high, y, p.colour))
      taken.append((low - 3, y - 5, high + 3, y + 5))
    if p.y_bounds:
      low, high = map(py, p.y_bounds)
      whiskers.append(_whisker(x, low, high, p.colour))
      taken.append((x - 5, high - 3, x + 5, low + 3))
  for p in points:
    # Under the whiskers: a name's line to its point must not look like an interval.
    parts.append(_named(p.name, px(p.x), py(p.y), taken, (left, top, right, bottom)))
  return ''.join(parts + whiskers + markers) + '</svg>'


def _named(name, x, y, taken, frame) -> str:
  """A name where there is room, with a line to its point at (x, y) if it stands far off."""
  box = _room(x, y, CHARACTER * len(name), taken, frame)
  taken.append(box)
  near = (min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3]))
  line = ''
  if math.dist(near, (x, y)) > 12:
    line = _line(x, y, *near, 'stroke="currentColor" stroke-opacity="0.45"')
  place, anchor = (box[0] + box[2]) / 2, 'middle'
  if near[0] == box[0]:
    place, anchor = box[0] + 2, 'start'
  elif near[0] == box[2]:
    place, anchor = box[2] - 2, 'end'
  return line + _text(place, box[3] - 4, name, anchor)


def _room(x, y, width, taken, frame) -> tuple[float, float, float, float]:
  """The place for a name near (x, y) that covers least of what is there, the nearest of these."""
  height, best = FONT + 3, None
  for distance in (8, 16, 28, 42, 60, 84, 112):
    for turn in (-2, 2, 6, -6, 0, 8, 4, -4, *(1, -1, 3, -3, 5, -5, 7, -7)):
      angle = turn * math.pi / 8
      across, along = math.cos(angle), math.sin(angle)
      middle_x = x + across * (distance + width / 2)
      middle_y = y + along * (distance + height / 2)
      box = (
        middle_x - width / 2,
        middle_y - height / 2,
        middle_x + width / 2,
        middle_y + height / 2,
      )
      outside = sum(
        max(0, d)
        for d in (frame[0] - box[0], frame[1] - box[1], box[2] - frame[2], box[3] - frame[3])
      )
      cost = sum(_overlap(box, other) for other in taken) + 40 * outside
      if best is None or cost < best[0]:
        best = (cost, box)
      if not cost:
        return box
  return best[1]


def _overlap(a, b) -> float:
  return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def _extent(values: list[tuple[float, tuple[float, float] | None]]) -> tuple[float, float]:
  known = [v for value, bounds in values for v in (value, *(bounds or ())) if _finite(v)]
  return min(known), max(known)


def standalone(svg: str) -> str:
  """Returns a figure as a file's text: black on white, a fixed typeface, a size in pixels."""
  width, height = re.search(r'viewBox="0 0 (\S+) (\S+)"', svg).groups()
  head, tail = svg.split('>', 1)
  head = head.replace('font-family="inherit"', f'font-family="{TYPEFACE}" color="#000000"')
  return (
    f'{head} width="{width}" height="{height}">'
    f'<rect width="{width}" height="{height}" fill="#ffffff"/>{tail}\n'
  )


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
  """Returns about `count` evenly spaced round numbers, the first <= low and the last >= high."""
  if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
    margin = abs(low) * 0.5 or 1.0
    low, high = low - margin, high + margin
  raw = (high - low) / count
  power = 10.0 ** math.floor(math.log10(raw))
  step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  return [i * step for i in range(first, last + 1)]


def tick_labels(ticks: list[float]) -> list[str]:
  """Returns the ticks with as many digits as their distance needs, and all with the same."""
  step = ticks[1] - ticks[0]
  largest = max(map(abs, ticks))
  if largest >= 1e6 or largest < 1e-3:
    return ['0' if t == 0 else f'{t:.3g}' for t in ticks]
  decimals = next((d for d in range(12) if abs(step - round(step, d)) < 1e-6 * step), 12)
  return [f'{t:,.{decimals}f}' for t in ticks]


def thinned(x: tuple, y: tuple, buckets: int = 400) -> tuple[tuple, tuple]:
  """Returns at most two points a bucket, its lowest and its highest, so no peak is lost.

  Finite values only; a curve with few points comes back whole.
  """
  if len(x) <= 2 * buckets:
    return tuple(x), tuple(y)
  kept = []
  for i in range(buckets):
    span = range(i * len(x) // buckets, (i + 1) * len(x) // buckets)
    kept += sorted({min(span, key=y.__getitem__), max(span, key=y.__getitem__)})
  return tuple(x[i] for i in kept), tuple(y[i] for i in kept)


def _finite(value) -> bool:
  return value is not None and math.isfinite(value)


def _inner_ticks(low: float, high: float) -> list[tuple[float, str]]:
  # The x axis ends where the data end: only the round numbers inside are marked.
  if low == high:
    return [(low, f'{low:g}')]
  ticks = nice_ticks(low, high)
  named = zip(ticks, tick_labels(ticks), strict=True)
  return [(t, name) for t, name in named if low <= t <= high]


def _drawn(s: Series, px, py, x_label: str) -> str:
  runs, run = [], []
  for x, y in zip(s.x, s.y, strict=True):
    if math.isfinite(y):
      run.append((x, y))
    elif run:
      runs, run = [*runs, run], []
  runs = [*runs, run] if run else runs
  marked = not s.faint and len(s.x) <= MARKED
  parts = []
  if s.low:
    parts += [
      _whisker(px(x), py(low), py(high), s.colour)
      for x, low, high in zip(s.x, s.low, s.high, strict=True)
      if _finite(low) and _finite(high)
    ]
  width = 'stroke-width="1" stroke-opacity="0.4"' if s.faint else 'stroke-width="2"'
  dash = f' stroke-dasharray="{DASHES[s.colour]}"' if marked and DASHES[s.colour] else ''
  for run in runs:
    xs, ys = thinned(*zip(*run, strict=True))
    path = ' '.join(f'{px(x):.1f},{py(y):.1f}' for x, y in zip(xs, ys, strict=True))
    parts.append(
      f'<polyline points="{path}" fill="none" stroke-linejoin="round" {_stroke(s.colour)} '
      f'{width}{dash}/>'
    )
  if marked:
    parts += [
      _marker(px(x), py(y), s.colour, f'{s.name}, {x_label} {x:g}: {y:.4g}')
      for run in runs
      for x, y in run
    ]
  return '<g>' + ''.join(parts) + '</g>'


def _legend(series: list[Series], left: float, right: float) -> tuple[list[str], int]:
  """The names of the series, each with its line, and how many lines of text they take."""
  parts, x, row = [], left, 0
  for s in series:
    width = 28 + CHARACTER * len(s.name)
    if x > left and x + width > right:
      x, row = left, row + 1
    y = 14 + 20 * row
    weight = 'stroke-width="1" stroke-opacity="0.5"' if s.faint else 'stroke-width="2"'
    parts.append(_line(x, y, x + 22, y, f'{_stroke(s.colour)} {weight}'))
    if not s.faint and len(s.x) <= MARKED:
      parts.append(_marker(x + 11, y, s.colour, s.name))
    parts.append(_text(x + 28, y + 4, s.name, 'start'))
    x += width + 20
  return parts, row + 1


def _opened(width: float, height: float, description: str) -> str:
  return (
    '<svg xmlns="http://www.w3.org/2000/svg" class="figure" '
    f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(description)}" '
    f'font-family="inherit" font-size="{FONT}" fill="currentColor">'
  )


def _x_axis(left: float, right: float, y: float, ticks: list[tuple[float, str]]) -> list[str]:
  parts = [_line(left, y, right, y, 'stroke="currentColor" stroke-opacity="0.7"')]
  for x, label in ticks:
    parts.append(_line(x, y, x, y + 4, 'stroke="currentColor" opacity="0.7"'))
    parts.append(_text(x, y + 17, label, 'middle'))
  return parts


def _axis_labels(left, right, top, bottom, height, x_label, y_label) -> list[str]:
  middle = (top + bottom) / 2
  return [
    _text((left + right) / 2, height - 8, x_label, 'middle'),
    _text(13, middle, y_label, 'middle', f'transform="rotate(-90 13 {middle:.1f})"'),
  ]


def _span(low: float, high: float, y: float, colour: int) -> str:
  style = f'{_stroke(colour)} stroke-width="1.4"'
  caps = ''.join(_line(x, y - 4, x, y + 4, style) for x in (low, high))
  return _line(low, y, high, y, style) + caps


def _whisker(x: float, low: float, high: float, colour: int) -> str:
  style = f'{_stroke(colour)} stroke-width="1.4"'
  caps = ''.join(_line(x - 4, y, x + 4, y, style) for y in (low, high))
  return _line(x, low, x, high, style) + caps


def _marker(x: float, y: float, colour: int, title: str) -> str:
  shapes = (
    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" ',
    f'<rect x="{x - 3.6:.1f}" y="{y - 3.6:.1f}" width="7.2" height="7.2" ',
    f'<path d="M{x:.1f} {y - 5:.1f}l4.8 8.4h-9.6z" ',
    f'<path d="M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z" ',
  )
  shape = shapes[colour % len(shapes)]
  name = shape[1 : shape.index(' ')]
  return f'{shape}{_fill(colour)}><title>{escape(title)}</title></{name}>'


def _stroke(colour: int) -> str:
  return f'class="c{colour} stroke" stroke="{COLOURS[colour]}"'


def _fill(colour: int) -> str:
  return f'class="c{colour} fill" fill="{COLOURS[colour]}"'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
  return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'


def _text(x: float, y: float, text: str, anchor: str, more: str = '') -> str:
  return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(text)}</text>'
