"""Paired differences between rows of a table, with their intervals and adjusted p-values.

A difference is a dict with `value` and `interval`, and with `p_value` and `adjusted_p_value` if it
was tested. The adjusted one belongs to a family of comparisons (Holm 1979).
"""

from typing import Any

from cai_jax.report.elements import escape
from cai_jax.report.numbers import num_decimals
from cai_jax.runtime.errors import UserError

LARGEST_P_VALUE = 0.05  # adjusted p-value of a difference that is marked
PROMPT_INTERVALS = '95 % interval over prompts: of rates Wilson, of their differences Tango'
SEED_INTERVALS = '95 % interval over prompts and seeds: of rates Wilson, of their differences Tango'
ADJUSTED = "p: adjusted by Holm's method for the rows of its block with the same measure"


def format_difference(row: dict[str, Any], metric: str) -> str:
  """Format a paired difference, such as '−33.0 [−36.0, −30.0]', or '' if there is none.

  Args:
    row: a row with `differences` by metric.
    metric: the metric's name. Differences of rates are in percentage points.
  """
  number = row.get('differences', {}).get(metric)
  if number is None or number['value'] is None:
    return ''
  unit = 100 if metric.endswith('_rate') else 1
  largest = max(map(abs, (number['value'], *(number['interval'] or ()))))
  decimals = 1 if unit == 100 else num_decimals(largest)

  def signed(value: float) -> str:
    text = f'{unit * value:+,.{decimals}f}'
    return text[1:] if not text.strip('+-0.,') else text.replace('-', '−')

  text = signed(number['value'])
  if number['interval']:
    text += f' [{", ".join(map(signed, number["interval"]))}]'
  return text


def difference_text(row: dict[str, Any], metric: str) -> str:
  """Return `format_difference` with the adjusted p-value, and '*' if the difference is marked.

  Args:
    row: a row with `differences` by metric.
    metric: the metric's name.
  """
  text = format_difference(row, metric)
  if not text:
    return ''
  number = row['differences'][metric]
  return text + format_p_value(number) + (' *' if difference_direction(number) else '')


def difference_html(row: dict[str, Any], metric: str) -> str:
  """Return a paired difference as an HTML element, or '' if there is none.

  Args:
    row: a row with `differences` by metric.
    metric: the metric's name.
  """
  text = format_difference(row, metric)
  if not text:
    return ''
  number = row['differences'][metric]
  value, _, brackets = escape(text).partition(' [')
  unit = '&nbsp;pp' if metric.endswith('_rate') else ''
  interval = f' <span class="interval">[{brackets}</span>' if brackets else ''
  p_value = f'<span class="p">{escape(format_p_value(number))}</span>'
  direction = difference_direction(number)
  word = {'lower': ' <b>▼ lower</b>', 'higher': ' <b>▲ higher</b>', '': ''}[direction]
  return f'<span class="difference">{value}{unit}{interval}{p_value}{word}</span>'


def format_p_value(number: dict[str, Any]) -> str:
  """Return the adjusted p-value, such as ' p=0.012' or ' p<0.001', or '' without a test."""
  p_value = number.get('adjusted_p_value')
  if p_value is None:
    return ''
  return ' p<0.001' if p_value < 0.001 else f' p={p_value:.3f}'


def difference_direction(number: dict[str, Any]) -> str:
  """Return 'lower' or 'higher' if the difference is marked, else ''.

  A difference is marked if its adjusted p-value is at most 0.05 or, without a test, if its interval
  excludes zero.

  Args:
    number: a difference.

  Raises:
    UserError: if the interval is not (low, high).
  """
  bounds, p_value = number['interval'], number.get('adjusted_p_value')
  if bounds is not None and (len(bounds) != 2 or bounds[0] > bounds[1]):
    raise UserError(f'The interval of a difference is {bounds!r}. It must be [low, high] or None.')
  if p_value is not None:
    marked = p_value <= LARGEST_P_VALUE
    return ('lower' if number['value'] < 0 else 'higher') if marked else ''
  if bounds is None:
    return ''
  return 'lower' if bounds[1] < 0 else 'higher' if bounds[0] > 0 else ''


def explain_marks(rows: list[dict[str, Any]], lower: str, higher: str) -> str:
  """Return the sentence that explains the marks and the p-values of the differences of rows.

  Args:
    rows: rows with `differences` by metric.
    lower: how a difference is marked that is lower, such as '▼ lower'.
    higher: the same for one that is higher.
  """
  marks = lower if lower == higher else f'{higher} or {lower}'
  if any('adjusted_p_value' in n for row in rows for n in row.get('differences', {}).values()):
    return f'{ADJUSTED}; {marks}: p ≤ {LARGEST_P_VALUE}'
  return f'{marks}: the interval excludes zero'
