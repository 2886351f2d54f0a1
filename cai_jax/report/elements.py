"""HTML elements that the pages of runs and experiments share. All text is escaped."""

import html
import json
import math
import re
from typing import Any

from cai_jax.report.numbers import MISSING, cell, interval
from cai_jax.report.palette import COLOURS, OTHER_COLOUR, RATE_COLOURS


def escape(text: Any) -> str:
  """Return text that is safe in HTML and XML, both as content and in attributes."""
  return html.escape(printable(str(text)), quote=True)


def printable(text: str) -> str:
  """Return the text with every character that XML does not allow replaced by U+FFFD."""
  return ''.join(c if _is_xml_character(ord(c)) else '\ufffd' for c in text)


def _is_xml_character(code: int) -> bool:
  return code in (9, 10, 13) or 32 <= code < 0xD800 or 0xE000 <= code < 0xFFFE or code >= 0x10000


def section(title: str, body: str) -> str:
  """Return a section of the page as HTML, with a heading.

  Args:
    title: plain text.
    body: HTML.
  """
  name = re.sub(r'[^a-z]+', '-', title.lower())
  return (
    f'<section aria-labelledby="{name}-title"><h2 id="{name}-title">{escape(title)}</h2>'
    f'{body}</section>'
  )


def fold(summary: str, body: str, is_open: bool = False) -> str:
  """Return HTML that is hidden until the reader clicks on its summary.

  Args:
    summary: plain text.
    body: HTML.
    is_open: whether it is shown at first.
  """
  return (
    f'<details{" open" if is_open else ""}><summary>{escape(summary)}</summary>{body}</details>'
  )


def preformatted(text: str) -> str:
  """Return plain text as HTML that keeps its line breaks."""
  return f'<pre>{escape(text)}</pre>'


def fact_list(facts: dict[str, Any]) -> str:
  """Return an HTML list of names and values, without those that are None.

  Args:
    facts: values by name.
  """
  pairs = [
    f'<div><dt>{escape(key.replace("_", " "))}</dt><dd>{escape(value)}</dd></div>'
    for key, value in facts.items()
    if value is not None
  ]
  return f'<dl class="facts">{"".join(pairs)}</dl>' if pairs else ''


def note_list(notes: list[str]) -> str:
  """Return an HTML list of sentences, or '' if there are none.

  Args:
    notes: plain texts.
  """
  items = ''.join(f'<li>{escape(note)}</li>' for note in notes)
  return f'<ul class="notes">{items}</ul>' if items else ''


def figure(caption: str, svg: str, wide: bool = False) -> str:
  """Return a figure with its caption as HTML.

  Args:
    caption: plain text.
    svg: the figure, as an `<svg>` element.
    wide: whether the figure takes the full width of the page.
  """
  kind = ' class="wide"' if wide else ''
  return f'<figure{kind}><figcaption>{escape(caption)}</figcaption>{svg}</figure>'


def figure_grid(figures: list[str], kind: str = '') -> str:
  """Return figures side by side, or '' if there are none.

  Args:
    figures: HTML of each figure.
    kind: a further class of their container; 'multiples' makes them small.
  """
  classes = f'figures {kind}'.strip()
  return f'<div class="{classes}">{"".join(figures)}</div>' if figures else ''


def number_html(row: dict[str, Any], key: str) -> str:
  """Return one number with its interval as HTML; a rate also has a bar.

  Args:
    row: the numbers of a row, as `cai_jax.report.numbers` describes.
    key: the key of the number.

  Raises:
    UserError: see `cai_jax.report.numbers.cell`.
  """
  text = escape(cell(row, key))
  bounds = interval(row, key)
  is_rate = key.endswith('_rate') and row.get(key) is not None
  if not is_rate and not bounds:
    return text
  number, _, brackets = text.partition(' [')
  content = f'<span class="number">{number}</span>'
  content += f' <span class="interval">[{brackets}</span>' if brackets else ''
  bar = _rate_bar(row[key], bounds, RATE_COLOURS.get(key, OTHER_COLOUR)) if is_rate else ''
  return f'<span class="rate">{bar}{content}</span>'


def _rate_bar(value: float, bounds: tuple[float, float] | None, colour: int) -> str:
  """Return a small SVG bar of a rate with its interval. Screen readers skip it."""
  width, height = 92, 12
  left, span, middle = 1, width - 2, height / 2
  parts = [
    f'<svg xmlns="http://www.w3.org/2000/svg" class="mark" viewBox="0 0 {width} {height}" '
    f'width="{width}" height="{height}" aria-hidden="true">',
    f'<rect x="{left}" y="2" width="{span}" height="8" fill="currentColor" fill-opacity="0.09"/>',
    f'<rect x="{left}" y="2" width="{span * value:.1f}" height="8" class="c{colour} fill" '
    f'fill="{COLOURS[colour]}"/>',
  ]
  if bounds:
    low, high = (left + span * bound for bound in bounds)
    parts.append(
      f'<line x1="{low:.1f}" y1="{middle}" x2="{high:.1f}" y2="{middle}" stroke="currentColor" '
      'stroke-width="1.6"/>'
    )
  return ''.join(parts) + '</svg>'


def cost_cell(key: str, value: Any) -> str:
  """Return a value of a stage in the manifest as HTML.

  Args:
    key: name of the value. Memory is shown in MiB or GiB.
    value: a number, or a dict from reason to count.
  """
  if value is None:
    return MISSING
  if isinstance(value, dict):
    total = f'{sum(value.values()):,}'
    reasons = ''.join(f'<div class="reason">{escape(k)}: {n:,}</div>' for k, n in value.items())
    return total + reasons
  if key == 'peak_memory_bytes':
    return f'{value / 2**20:,.0f} MiB' if value < 2**30 else f'{value / 2**30:,.1f} GiB'
  return escape(format_value(value))


def format_value(value: Any) -> str:
  """Return a JSON value as a short text."""
  if isinstance(value, dict):
    return ', '.join(f'{key.replace("_", " ")} {format_value(item)}' for key, item in value.items())
  if isinstance(value, bool) or not isinstance(value, int | float):
    return value if isinstance(value, str) else json.dumps(finite_json(value), default=str)
  if isinstance(value, int):
    return f'{value:,}'
  return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:,.3g}'


def indented_json(value: Any) -> str:
  """Return a value as indented JSON for people to read."""
  return json.dumps(finite_json(value), indent=2, ensure_ascii=False, default=str)


def finite_json(value: Any) -> Any:
  """Return the value with NaN and infinities, which JSON lacks, replaced by strings."""
  if isinstance(value, dict):
    return {key: finite_json(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [finite_json(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return 'NaN' if math.isnan(value) else 'Infinity' if value > 0 else '-Infinity'
  return value
