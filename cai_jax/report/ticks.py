"""Ticks of an axis, and the reduction of long series to the points that a figure can show."""

from collections.abc import Sequence

from matplotlib.ticker import MaxNLocator


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
  """Return evenly spaced round numbers that span low to high.

  Args:
    low: the smallest value to cover.
    high: the largest value to cover.
    count: the approximate number of ticks.
  """
  if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
    margin = abs(low) * 0.5 or 1.0
    low, high = low - margin, high + margin
  locator = MaxNLocator(nbins=count, steps=[1, 2, 2.5, 5, 10])
  return [float(tick) for tick in locator.tick_values(low, high)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
  """Return the ticks as text, all with as many decimals as their spacing needs."""
  step = ticks[1] - ticks[0]
  largest = max(map(abs, ticks))
  if largest >= 1e6 or largest < 1e-3:
    return ['0' if abs(tick) < 1e-9 * largest else f'{tick:.3g}' for tick in ticks]
  decimals = next((d for d in range(12) if abs(step - round(step, d)) < 1e-6 * step), 12)
  return [f'{tick + 0.0:,.{decimals}f}' for tick in ticks]


def inner_ticks(low: float, high: float) -> list[tuple[float, str]]:
  """Return (position, label) of the round numbers between `low` and `high`.

  Args:
    low: lower bound.
    high: upper bound.
  """
  if low == high:
    return [(low, f'{low:g}')]
  ticks = nice_ticks(low, high)
  return [
    (t, label) for t, label in zip(ticks, tick_labels(ticks), strict=True) if low <= t <= high
  ]


def thin(
  x: Sequence[float], y: Sequence[float], buckets: int = 400
) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Return fewer points of a curve: the lowest and the highest of each bucket.

  All peaks remain.

  Args:
    x, y: coordinates of the curve; finite.
    buckets: number of buckets. A curve of at most twice as many points is returned unchanged.
  """
  if len(x) <= 2 * buckets:
    return tuple(x), tuple(y)
  kept: list[int] = []
  for i in range(buckets):
    span = range(i * len(x) // buckets, (i + 1) * len(x) // buckets)
    kept += sorted({min(span, key=y.__getitem__), max(span, key=y.__getitem__)})
  return tuple(x[i] for i in kept), tuple(y[i] for i in kept)
