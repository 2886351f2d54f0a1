"""Tables in Markdown pages that a program writes between two marks."""

from collections.abc import Iterable, Sequence

END = '<!-- End of the generated table. -->\n'


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """Return a Markdown table.

  Args:
    header: the names of the columns.
    rows: the cells of each row.
  """
  lines = [header, ('---',) * len(header), *rows]
  return ''.join(f'| {" | ".join(cells)} |\n' for cells in lines)


def fill(page: str, begin: str, content: str) -> str:
  """Return a page with new content between its mark `begin` and the mark `END` below it.

  Args:
    page: the page.
    begin: the mark above the content, with its line end.
    content: the content, with its line end.

  Raises:
    ValueError: if the page does not have both marks.
  """
  before, mark, rest = page.partition(begin)
  _, end, after = rest.partition(END)
  if not mark or not end:
    raise ValueError(f'The page must have {begin.strip()!r} and, below it, {END.strip()!r}.')
  return f'{before}{begin}\n{content}\n{end}{after}'
