"""Markdown for cards: text of models and settings is escaped, so that it stays text."""

import re
from collections.abc import Sequence
from typing import Any

_SPECIAL = re.compile(r'([\\`*|]|(?<=\])\()')


def escape(text: str) -> str:
  """Return a text as one line in which Markdown and HTML have no meaning.

  Args:
    text: any text.
  """
  line = _SPECIAL.sub(r'\\\1', ' '.join(text.split()))
  return line.replace('<', '&lt;').replace('>', '&gt;')


def code(value: Any) -> str:
  """Return a value as inline code that also works in a table.

  Args:
    value: any value; blank text and anything but a str is shown as `repr` shows it.
  """
  is_shown = isinstance(value, str) and value.strip()
  text = ' '.join((value if is_shown else repr(value)).split()).replace('|', '\\|')
  longest = max(map(len, re.findall('`+', text)), default=0)
  fence, space = '`' * (longest + 1), ' ' * bool(longest)
  return f'{fence}{space}{text}{space}{fence}'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Return a table.

  Args:
    header: the headings, in Markdown.
    rows: the cells of each row, in Markdown.
  """
  lines = [header, ['---'] * len(header), *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def folded(summary: str, body: str) -> str:
  """Return a part that a page shows after a click.

  Args:
    summary: what the page shows before it, in Markdown.
    body: the part, in Markdown.
  """
  return f'<details>\n<summary>{summary}</summary>\n\n{body}\n\n</details>'
