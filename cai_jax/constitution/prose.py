"""Constitutions in prose: a Markdown document whose sections are the principles.

A section begins with a heading (`# Title`, of any level) and has a text. Headings without a text,
and what precedes the first heading, belong to the section that follows.
"""

import os
import re

from cai_jax.constitution.principles import MAX_ID, Constitution, Principle
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.text_files import read_text

SUFFIX = '.md'
MAX_SIZE = 2**20  # characters
CRITIQUE = (
  'Here is a section of our constitution:\n\n{text}\n\nIdentify the specific ways in which your '
  'last response departs from it.'
)
REVISION = (
  'Rewrite your last response so that it follows the section "{title}" of our constitution and '
  'still helps.'
)
COMPARISON = (
  'Here is a section of our constitution:\n\n{text}\n\nChoose the response that follows it better.'
)
_HEADING = re.compile(r' {0,3}#{1,6}[ \t]+(?P<title>.*?)[ \t#]*$')
_FENCE = re.compile(r' {0,3}(```|~~~)')


def read_prose(path: str) -> Constitution:
  """Return a constitution with one principle for each section of a document.

  Args:
    path: a Markdown file.

  Raises:
    UserError: if the file is missing, has no section with a text, or two sections have one title.
  """
  if not os.path.isfile(path):
    raise UserError('there is no such file.')
  sections = split_sections(read_text(path, MAX_SIZE))
  if not sections:
    raise UserError(
      'the document has no section. Begin each section with a heading such as "# Honesty", and a '
      'text below it.'
    )
  principles = [
    Principle(
      _name(title),
      CRITIQUE.format(text=text),
      REVISION.format(title=title),
      comparison_request=COMPARISON.format(text=text),
    )
    for title, text in sections
  ]
  texts = tuple((p.id, text) for p, (_, text) in zip(principles, sections, strict=True))
  return Constitution(tuple(principles), sections=texts)


def split_sections(document: str) -> list[tuple[str, str]]:
  """Return (title, text) of each section with a text; together the texts are the whole document.

  Args:
    document: Markdown. Lines in fenced code are no headings.
  """
  sections: list[tuple[str, str]] = []
  title, lines, has_text, fenced = '', list[str](), False, False
  for line in document.splitlines():
    fenced ^= bool(_FENCE.match(line))
    heading = None if fenced else _HEADING.match(line)
    if heading and title and has_text:
      sections.append((title, '\n'.join(lines).strip()))
      lines, has_text = [], False
    title = heading['title'].strip() if heading else title
    has_text |= heading is None and bool(title) and bool(line.strip())
    lines.append(line)
  if title and has_text:
    sections.append((title, '\n'.join(lines).strip()))
  elif sections:  # headings without a text at the end
    last, text = sections[-1]
    sections[-1] = last, '\n'.join([text, *lines]).strip()
  return sections


def _name(title: str) -> str:
  """Return the id of a section: its title in lower case, with hyphens between words."""
  return '-'.join(re.findall(r'\w+', title.lower()))[:MAX_ID]
