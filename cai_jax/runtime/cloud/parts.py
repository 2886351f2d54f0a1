"""Files that grow, in a store that cannot append: an object and the parts that follow it.

A part is an object of its own whose name has the version of the first object and the bytes that it
holds. So parts that belong to an older first object are never read with a newer one.
"""

import pathlib
import re
from collections.abc import Iterable

from cai_jax.runtime.cloud.index import FOLDER

PARTS = f'{FOLDER}/parts'
LARGEST = 64 << 20  # bytes of what is written again when parts become one

_NAME = re.compile(rf'{re.escape(PARTS)}/(.+)/([0-9a-f]+)/(\d+)-(\d+)')

Range = tuple[int, int]  # the first byte, and the byte after the last


def part_name(file: str, version: str, part: Range) -> str:
  """Return the name of a part's object.

  Args:
    file: name of the file.
    version: version of its first object.
    part: the bytes of the file that the part holds.
  """
  return f'{PARTS}/{file}/{version}/{part[0]:015d}-{part[1]:015d}'


def group_parts(names: Iterable[str]) -> dict[tuple[str, str], list[Range]]:
  """Return the parts among the names of objects, by file and version of its first object."""
  groups: dict[tuple[str, str], list[Range]] = {}
  for name in names:
    if match := _NAME.fullmatch(name):
      groups.setdefault((match[1], match[2]), []).append((int(match[3]), int(match[4])))
  return groups


def read_range(path: pathlib.Path, part: Range) -> bytes:
  """Return a part of a local file."""
  with open(path, 'rb') as file:
    file.seek(part[0])
    return file.read(part[1] - part[0])


def follow(size: int, parts: Iterable[Range]) -> list[Range]:
  """Return the parts that continue a first object, in their order, without gaps.

  After a kill, small parts may be there beside the one into which they were merged.

  Args:
    size: number of bytes of the first object.
    parts: all parts of the file with this first object.
  """
  longest: dict[int, int] = {}
  for start, end in parts:
    longest[start] = max(end, longest.get(start, 0))
  chain = []
  while longest.get(size, 0) > size:
    chain.append((size, longest[size]))
    size = longest[size]
  return chain


def merge(pieces: list[Range], new: Range) -> tuple[list[Range], Range]:
  """Return which pieces stay, and the piece to write for new bytes and those that go.

  A piece that is not longer than what follows it is written again together with that. So a file has
  a logarithmic number of pieces, until they have the size `LARGEST`.

  Args:
    pieces: the first object and the parts, in their order.
    new: the new bytes, which follow them.
  """
  kept = list(pieces)
  while kept and kept[-1][1] - kept[-1][0] <= new[1] - new[0]:
    if new[1] - kept[-1][0] > LARGEST:
      break
    new = kept.pop()[0], new[1]
  return kept, new
