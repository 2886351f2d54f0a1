"""Numbers of findings: differences of two rows of a summary, and numbers as text."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from cai_jax.report.numbers import interval, num_decimals

Difference = tuple[float, float, float]  # value, low, high


def is_number(value: Any, finite: bool = True) -> TypeGuard[float]:
  """Return whether a JSON value is a number.

  Args:
    value: the value.
    finite: whether NaN and infinities do not count.
  """
  is_real = isinstance(value, int | float) and not isinstance(value, bool)
  return is_real and (not finite or math.isfinite(value))


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Difference]:
  """Return after minus before, with its interval, for each number that has one in both rows.

  The interval is made from the two intervals (the MOVER method of Zou and Donner 2008), as if the
  rows were independent. For the same prompts, whose values are correlated, it is too wide.

  Args:
    before: a row of the summary.
    after: another row.
  """
  found = {}
  for key in before:
    if not (is_number(before[key]) and is_number(after.get(key))):
      continue
    first, second = interval(dict(before), key), interval(dict(after), key)
    if first and second:
      a, b = before[key], after[key]
      low = math.hypot(b - second[0], first[1] - a)
      high = math.hypot(second[1] - b, a - first[0])
      found[key] = (b - a, b - a - low, b - a + high)
  return found


def find_difference(entry: Mapping[str, Any]) -> Difference:
  """Return a difference {'value', 'interval'} as (value, low, high)."""
  low, high = entry['interval']
  return entry['value'], low, high


def average_ends(values: Sequence[float]) -> tuple[float, float, int]:
  """Return the means of the first and of the last tenth of values, and the size of a tenth.

  Args:
    values: at least one.
  """
  size = max(1, len(values) // 10)
  return statistics.fmean(values[:size]), statistics.fmean(values[-size:]), size


def share(rate: float, bounds: Sequence[float] | None = None) -> str:
  """Return a share in per cent, with its interval if it has one."""
  text = f'{100 * rate:.1f} %'
  return text + (f' [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]' if bounds else '')


def points(key: str, difference: Difference) -> str:
  """Return a difference with its interval; those of rates are in percentage points.

  Args:
    key: name of the number, which ends in `_rate` if it is a rate.
    difference: value, low, high.
  """
  is_rate = key.endswith('_rate')
  value, low, high = (100 * x if is_rate else x for x in difference)
  decimals = 1 if is_rate else num_decimals(value)
  unit = ' points' if is_rate else ''
  return f'{value:+.{decimals}f}{unit} [{low:+.{decimals}f}, {high:+.{decimals}f}]'
