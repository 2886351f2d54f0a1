"""Text for the terminal. Models, prompts, servers and file names may contain anything.

Everything that the package prints goes through `say`, so that no text can move the cursor, change
colours, set the window's title, or show itself in another order (bidirectional overrides).
"""

import sys
from typing import TextIO


def printable(text: str) -> str:
  """Return the text with every control, format and surrogate character escaped, except newlines.

  Args:
    text: any text. Text that is printable already is returned as it is.
  """
  if text.isprintable():
    return text
  return ''.join(
    c if c.isprintable() or c == '\n' else c.encode('unicode_escape').decode() for c in text
  )


def say(text: object = '', file: TextIO | None = None) -> None:
  """Print a text at once, with `printable`.

  Args:
    text: what to print; anything but a str is printed as `str` shows it.
    file: where to print; the default is stdout.
  """
  print(printable(str(text)), file=file or sys.stdout, flush=True)
