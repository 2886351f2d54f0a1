"""Build hook: links from docs/ to files of the repository that are not pages become plain code."""

import re

OUTSIDE = re.compile(r'\[(`?[^\]]+?`?)\]\((?:\.\./)+[^)]+\)')


def on_page_markdown(markdown: str, **_) -> str:
  """Return the page with links that leave docs/ replaced by their text."""
  return OUTSIDE.sub(r'\1', markdown)
