"""Layouts: what a template writes, with a numbered slot in place of each content."""

import re
from collections.abc import Sequence
from typing import Any

from cai_jax.dialogue.encode import SLOT

# A rendered template as [text, slot, text, slot, ..., text]; a slot is the index of the message
# whose content belongs there.
Layout = list[Any]

_PATTERN = re.compile(f'{SLOT}(\\d+){SLOT}')


def slot(index: int) -> str:
  return f'{SLOT}{index}{SLOT}'


def split_slots(rendered: str) -> Layout:
  """Return the layout of a template that was rendered with slots for contents."""
  parts = _PATTERN.split(rendered)
  return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def extends(layout: Layout, prompt: Layout) -> bool:
  """Return whether a layout begins with all of `prompt`."""
  last = len(prompt) - 1
  return (
    len(layout) > last and layout[:last] == prompt[:last] and layout[last].startswith(prompt[last])
  )


def match_slots(layout: Layout, texts: Sequence[str], rendered: str) -> dict[int, str] | None:
  """Return the text in each slot if filling the slots gives `rendered`, else None.

  A template may strip a content; the result then contains the stripped text.
  """
  if not rendered.startswith(layout[0]):
    return None
  position, contents = len(layout[0]), {}
  for slot, following in zip(layout[1::2], layout[2::2], strict=True):
    text = texts[slot]
    for candidate in (text, text.strip(), text.lstrip(), text.rstrip()):
      if rendered.startswith(candidate + following, position):
        break
    else:
      return None
    contents[slot] = candidate
    position += len(candidate) + len(following)
  return contents if position == len(rendered) else None
