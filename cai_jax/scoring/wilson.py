"""The interval of a proportion."""

import math

from scipy import special


def wilson_interval(
  successes: float, count: float, level: float = 0.95, quantile: float | None = None
) -> tuple[float, float]:
  """Return the score interval of a proportion (Wilson 1927).

  Its ends are the p that solve |p̂ - p| = z √(p (1 - p) / n).

  Args:
    successes: number of successes, in [0, count]. It may be a fraction.
    count: number of trials n, or their effective number; more than 0.
    level: coverage of the interval, in (0, 1).
    quantile: z; by default the normal quantile of `level`.

  Returns:
    The lower and the upper end, in [0, 1].

  Raises:
    ValueError: if there are no trials, or more successes than trials.
  """
  if not 0 <= successes <= count or not count:
    raise ValueError(f'{successes} successes of {count} trials are no proportion.')
  z = float(special.ndtri((1 + level) / 2)) if quantile is None else quantile
  p = successes / count
  middle = p + z * z / (2 * count)
  half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
  low, high = (middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count)
  # The exact bounds are 0 and 1 here; rounding would miss them by 1e-19.
  return 0.0 if successes == 0 else float(low), 1.0 if successes == count else float(high)
