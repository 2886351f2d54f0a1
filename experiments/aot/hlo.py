"""What the text of a compiled program tells: its loops, collectives and copies.

The text is HLO, optimised and scheduled.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2}
BYTES |= {'f32': 4, 's32': 4, 'u32': 4, 'f64': 8, 's64': 8, 'u64': 8}
COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
LARGE_COPY = 2**20  # bytes from which a copy is counted


class Place(NamedTuple):
  """Where a computation stands."""

  depth: int  # fewest loops and conditionals around it
  runs: int  # times it runs, as far as the loops around it tell: others count as one


class Collective(NamedTuple):
  """One collective of a compiled program."""

  kind: str  # of COLLECTIVES
  bytes: int  # of its result on a device
  group: int  # devices that take part together
  depth: int  # loops and conditionals around it
  runs: int  # times it runs
  source: str  # the operation it came from

  @property
  def sent(self) -> float:
    """Bytes that each device has to send in one run, at least: those of a ring."""
    n = self.group
    share = {'all-reduce': 2 * (n - 1) / n, 'reduce-scatter': n - 1, 'collective-permute': 1}
    return self.bytes * share.get(self.kind, (n - 1) / n)


def instructions(text: str) -> Iterator[tuple[str, str, str, str]]:
  """(computation, result type, operation, whole line) of each instruction of an HLO module."""
  inside = ''
  for line in text.splitlines():
    if header := re.match(r'(ENTRY )?%?([\w.\-]+) .*\{$', line):
      inside = 'ENTRY' if header[1] else header[2]
    elif found := re.match(r'\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(', line):
      yield inside, found[1], found[2], line


def find_places(text: str) -> dict[str, Place]:
  """Where each computation stands that is reached from the entry, by its shallowest call."""
  called: dict[str, list[tuple[str, int, int]]] = {}
  limits = loop_limits(text)
  names = r'(?:calls|body|condition|to_apply|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)'
  for inside, _, operation, line in instructions(text):
    deeper = operation in ('while', 'conditional')
    condition = re.search(r'condition=%?([\w.\-]+)', line) if operation == 'while' else None
    runs = limits.get(condition[1], 1) if condition else 1
    for group in re.findall(names, line):
      for name in re.findall(r'[\w.\-]+', group):
        called.setdefault(inside, []).append((name, deeper, runs))
  places, waiting = {'ENTRY': Place(0, 1)}, ['ENTRY']
  while waiting:
    here = places[waiting[-1]]
    for other, deeper, runs in called.get(waiting.pop(), ()):
      found = Place(here.depth + deeper, here.runs * runs)
      if other not in places or found.depth < places[other].depth:
        places[other] = found
        waiting.append(other)
  return places


def loop_limits(text: str) -> dict[str, int]:
  """Times that loops run, by their condition: that a counter is less than a constant.

  The counter is taken to go from 0 by 1, as it does in JAX's scans and in the loops that XLA makes
  of a product and the collective around it. TPU programs do not tell it otherwise.
  """
  constants: dict[tuple[str, str], int] = {}
  limits = {}
  for inside, _, operation, line in instructions(text):
    if operation == 'constant' and (
      found := re.search(r'%?([\w.\-]+) = \S+ constant\((\d+)\)', line)
    ):
      constants[inside, found[1]] = int(found[2])
    elif found := re.match(r'\s+ROOT .* compare\(.*?%?([\w.\-]+)\), direction=LT', line):
      if (inside, found[1]) in constants:
        limits[inside] = constants[inside, found[1]]
  return limits


def find_collectives(text: str, places: dict[str, Place]) -> Iterator[Collective]:
  """The collectives of an HLO module, each once."""
  seen = set()
  for inside, result, operation, line in instructions(text):
    kind = operation.removesuffix('-start')
    if kind not in COLLECTIVES or inside not in places:
      continue
    # One that runs in steps beside other work stands in each of the fusions that it runs beside.
    channel = re.search(r'channel_id=(\d+)', line)
    if channel is not None and channel[1] in seen:
      continue
    seen.add(channel[1] if channel else line)
    sizes, group = shape_bytes(result), group_size(line)
    if kind == 'all-reduce' and 'all-reduce-scatter' in inside:
      # What TPUs scatter a sum with: a fusion of the sum and the slice that is wanted of it.
      kind, sizes = 'reduce-scatter', [size // group for size in sizes]
    # Those that are started have their operand, and flags, beside the result.
    beside = operation.endswith('-start') and kind != 'all-reduce'
    source = re.search(r'op_name="([^"]*)"', line)
    yield Collective(
      kind=kind,
      bytes=max(sizes) if beside else sum(sizes),
      group=group,
      depth=places[inside].depth,
      runs=places[inside].runs,
      source=source[1] if source else '',
    )


def shape_bytes(shapes: str) -> list[int]:
  """Bytes of each array in an HLO type."""
  found = re.findall(r'\b([a-z]+\d*)\[([\d,]*)\]', shapes)
  return [
    BYTES[kind] * math.prod(int(n) for n in sizes.split(',') if n)
    for kind, sizes in found
    if kind in BYTES
  ]


def group_size(line: str) -> int:
  """Devices that take part together in the collective of an HLO line."""
  if 'source_target_pairs' in line:
    return 2
  if found := re.search(r'replica_groups=\{\{([\d,]*)\}', line):
    return found[1].count(',') + 1
  if found := re.search(r'replica_groups=\[\d+,(\d+)\]', line):
    return int(found[1])
  if found := re.search(r'replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}', line):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
    parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
    return math.prod(int(part or sizes[axis]) for axis, part in parts)
  raise ValueError(f'no replica groups that are understood in: {line.strip()[:300]}')


def large_copies(text: str, places: dict[str, Place]) -> dict[int, int]:
  """Bytes that are copied in pieces of LARGE_COPY or more, by depth: a change of layout mostly.

  Those of a loop are counted as often as it is known to run. What stands inside a fusion is not
  counted: it is no array in memory.
  """
  copied: dict[int, int] = {}
  fused = set(re.findall(r' fusion\(.*calls=%?([\w.\-]+)', text))
  for inside, result, operation, _ in instructions(text):
    size = sum(shape_bytes(result))
    if operation == 'copy' and inside in places.keys() - fused and size >= LARGE_COPY:
      depth, runs = places[inside]
      copied[depth] = copied.get(depth, 0) + size * runs
  return copied
