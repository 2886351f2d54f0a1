"""Line figures as SVG text, for a page that stands on nothing but itself.

Colours are from Okabe and Ito's set, which readers with any colour vision tell apart; each series
also has a marker and a dash of its own, so that a figure survives a black-and-white print. Text and
axes take the page's colour (`currentColor`), and the classes `c0`, `c1`, ... let a page's style
sheet choose other colours on a dark ground.
"""

import dataclasses
import html
import math

COLOURS = ('#d55e00', '#0072b2', '#009e73', '#cc79a7', '#56b4e9', '#8a6d00')
DASHES = ('', '7 4', '2 3', '9 3 2 3', '4 2', '1 4')
FONT = 12
CHARACTER = 0.56 * FONT  # mean width of a character in a sans-serif face
WIDTH, HEIGHT = 480, 300  # of a drawing, in its own units; the page scales it
MARKED = 40  # points a series may have before its markers would touch


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
        raise ValueError(
          f'series {self.name!r} has {len(self.x)} x and {len(values)} {name}; give as many of each'
        )
    if (self.low is None) != (self.high is None):
      raise ValueError(f'series {self.name!r} has one of low and high; give both or neither')
    if self.colour not in range(len(COLOURS)):
      raise ValueError(
        f'series {self.name!r}: colour {self.colour} is not in 0..{len(COLOURS) - 1}'
      )


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
    raise ValueError(f'figure {description!r} has no finite point; leave it out')
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
  right, top, bottom = WIDTH - 16, 34 if legend else 14, HEIGHT - 46
  pad = 16 if len(x_ticks) <= 12 and max(len(s.x) for s in series) <= MARKED else 0

  def px(x):
    return left + pad + (x - x_low) / (x_high - x_low) * (right - left - 2 * pad)

  def py(y):
    return bottom - (y - y_low) / (y_high - y_low) * (bottom - top)

  parts = [
    f'<svg xmlns="http://www.w3.org/2000/svg" class="figure" viewBox="0 0 {WIDTH} {HEIGHT}" '
    f'role="img" aria-label="{escape(description)}" font-family="inherit" font-size="{FONT}" '
    'fill="currentColor">'
  ]
  for y, label in zip(y_ticks, y_names, strict=True):
    parts.append(_line(left, py(y), right, py(y), 'stroke="currentColor" stroke-opacity="0.16"'))
    parts.append(_text(left - 7, py(y) + 4, label, 'end'))
  parts.append(_line(left, bottom, right, bottom, 'stroke="currentColor" stroke-opacity="0.7"'))
  for x, label in x_ticks:
    parts.append(_line(px(x), bottom, px(x), bottom + 4, 'stroke="currentColor" opacity="0.7"'))
    parts.append(_text(px(x), bottom + 17, label, 'middle'))
  middle = (top + bottom) / 2
  parts.append(_text((left + right) / 2, HEIGHT - 8, x_label, 'middle'))
  parts.append(_text(13, middle, y_label, 'middle', f'transform="rotate(-90 13 {middle:.1f})"'))
  if legend:
    parts.append(_legend(series, left))
  for s in series:
    parts.append(_drawn(s, px, py, x_label))
  return ''.join(parts) + '</svg>'


def share_bar(value: float, bounds: tuple[float, float] | None, colour: int = 0) -> str:
  """Returns a small `<svg>` bar of a share in [0, 1] with its interval, to stand by its number."""
  width, height = 92, 12
  left, span, middle = 1, width - 2, height / 2
  parts = [
    f'<svg xmlns="http://www.w3.org/2000/svg" class="mark" viewBox="0 0 {width} {height}" '
    f'width="{width}" height="{height}" aria-hidden="true">',
    f'<rect x="{left}" y="2" width="{span}" height="8" fill="currentColor" fill-opacity="0.09"/>',
    f'<rect x="{left}" y="2" width="{span * value:.1f}" height="8" {_fill(colour)}/>',
  ]
  if bounds:
    low, high = (left + span * b for b in bounds)
    parts.append(_line(low, middle, high, middle, 'stroke="currentColor" stroke-width="1.6"'))
  return ''.join(parts) + '</svg>'


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


def escape(text: str) -> str:
  """Returns text fit for XML content and attributes; what XML cannot hold becomes U+FFFD."""
  held = ''.join(c if _xml_character(ord(c)) else '\ufffd' for c in str(text))
  return html.escape(held, quote=True)


def _xml_character(code: int) -> bool:
  return code in (9, 10, 13) or 32 <= code < 0xD800 or 0xE000 <= code < 0xFFFE or code >= 0x10000


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


def _legend(series: list[Series], left: float) -> str:
  parts, x = [], left
  for s in series:
    weight = 'stroke-width="1" stroke-opacity="0.5"' if s.faint else 'stroke-width="2"'
    parts.append(_line(x, 14, x + 22, 14, f'{_stroke(s.colour)} {weight}'))
    if not s.faint and len(s.x) <= MARKED:
      parts.append(_marker(x + 11, 14, s.colour, s.name))
    parts.append(_text(x + 28, 18, s.name, 'start'))
    x += 28 + CHARACTER * len(s.name) + 20
  return '<g>' + ''.join(parts) + '</g>'


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
