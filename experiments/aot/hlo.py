"""Read loops, collectives and copies from the text of a compiled program.

The text is optimized and scheduled HLO.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2}
BYTES |= {'f32': 4, 's32': 4, 'u32': 4, 'f64': 8, 's64': 8, 'u64': 8}
COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
LARGE_COPY = 2**20  # bytes; smaller copies are not counted


class Place(NamedTuple):
  """The position of a computation inside loops and conditionals."""

  depth: int  # number of loops and conditionals around it, on the shallowest path
  runs: int  # how often it runs; a loop of unknown length counts as one iteration


class Collective(NamedTuple):
  """One collective of a compiled program."""

  kind: str  # one of COLLECTIVES
  bytes: int  # of its result on one device
  group: int  # number of devices that take part together
  depth: int  # number of loops and conditionals around it
  runs: int  # how often it runs
  source: str  # the JAX operation that it comes from

  @property
  def sent(self) -> float:
    """The least number of bytes that each device sends in one run: that of a ring algorithm."""
    n = self.group
    share = {'all-reduce': 2 * (n - 1) / n, 'reduce-scatter': n - 1, 'collective-permute': 1}
    return self.bytes * share.get(self.kind, (n - 1) / n)


def instructions(text: str) -> Iterator[tuple[str, str, str, str]]:
  """Yield (computation, result type, operation, line) for each instruction of an HLO module."""
  computation = ''
  for line in text.splitlines():
    if header := re.match(r'(ENTRY )?%?([\w.\-]+) .*\{$', line):
      computation = 'ENTRY' if header[1] else header[2]
    elif match := re.match(r'\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(', line):
      yield computation, match[1], match[2], line


def find_places(text: str) -> dict[str, Place]:
  """Return the place of every computation that the entry reaches, by its shallowest call."""
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
      place = Place(here.depth + deeper, here.runs * runs)
      if other not in places or place.depth < places[other].depth:
        places[other] = place
        waiting.append(other)
  return places


def loop_limits(text: str) -> dict[str, int]:
  """Return the number of iterations of each loop, by the name of its condition.

  This understands conditions that compare a counter with a constant. It assumes that the counter
  starts at 0 and grows by 1, as in JAX's scans and in the loops that XLA makes of a product and the
  collective around it; a TPU program does not state it otherwise.
  """
  constants: dict[tuple[str, str], int] = {}
  limits = {}
  for inside, _, operation, line in instructions(text):
    if operation == 'constant' and (
      match := re.search(r'%?([\w.\-]+) = \S+ constant\((\d+)\)', line)
    ):
      constants[inside, match[1]] = int(match[2])
    elif match := re.match(r'\s+ROOT .* compare\(.*?%?([\w.\-]+)\), direction=LT', line):
      if (inside, match[1]) in constants:
        limits[inside] = constants[inside, match[1]]
  return limits


def find_collectives(text: str, places: dict[str, Place]) -> Iterator[Collective]:
  """Yield each collective of an HLO module once.

  Args:
    text: the module.
    places: as `find_places` returns them.
  """
  seen = set()
  for inside, result, operation, line in instructions(text):
    kind = operation.removesuffix('-start')
    if kind not in COLLECTIVES or inside not in places:
      continue
    # A collective that overlaps with other work is listed in every fusion that it overlaps with.
    channel = re.search(r'channel_id=(\d+)', line)
    if channel is not None and channel[1] in seen:
      continue
    seen.add(channel[1] if channel else line)
    sizes, group = shape_bytes(result), group_size(line)
    if kind == 'all-reduce' and 'all-reduce-scatter' in inside:
      # TPUs implement a reduce-scatter as a fusion of an all-reduce and a slice of its result.
      kind, sizes = 'reduce-scatter', [size // group for size in sizes]
    # The result type of an asynchronous start also has the operand and flags.
    is_start = operation.endswith('-start') and kind != 'all-reduce'
    source = re.search(r'op_name="([^"]*)"', line)
    yield Collective(
      kind=kind,
      bytes=max(sizes) if is_start else sum(sizes),
      group=group,
      depth=places[inside].depth,
      runs=places[inside].runs,
      source=source[1] if source else '',
    )


def shape_bytes(shapes: str) -> list[int]:
  """Return the bytes of each array in an HLO type."""
  arrays = re.findall(r'\b([a-z]+\d*)\[([\d,]*)\]', shapes)
  return [
    BYTES[kind] * math.prod(int(n) for n in sizes.split(',') if n)
    for kind, sizes in arrays
    if kind in BYTES
  ]


def group_size(line: str) -> int:
  """Return the number of devices that take part together in the collective of an HLO line.

  Raises:
    ValueError: if the line writes its replica groups in an unknown form.
  """
  if 'source_target_pairs' in line:
    return 2
  if match := re.search(r'replica_groups=\{\{([\d,]*)\}', line):
    return match[1].count(',') + 1
  if match := re.search(r'replica_groups=\[\d+,(\d+)\]', line):
    return int(match[1])
  if match := re.search(r'replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}', line):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
    parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
    return math.prod(int(part or sizes[axis]) for axis, part in parts)
  raise ValueError(f'unknown form of replica groups in: {line.strip()[:300]}')


def large_copies(text: str, places: dict[str, Place]) -> dict[int, int]:
  """Return the bytes of copies of at least LARGE_COPY bytes, by depth. Most change a layout.

  A copy inside a loop counts once per iteration, if their number is known. Copies inside fusions
  are not arrays in memory and do not count.
  """
  copied: dict[int, int] = {}
  fused = set(re.findall(r' fusion\(.*calls=%?([\w.\-]+)', text))
  for inside, result, operation, _ in instructions(text):
    size = sum(shape_bytes(result))
    if operation == 'copy' and inside in places.keys() - fused and size >= LARGE_COPY:
      depth, runs = places[inside]
      copied[depth] = copied.get(depth, 0) + size * runs
  return copied


# Instructions that move no data themselves, or whose start has been counted.
PASSIVE = {'get-tuple-element', 'tuple', 'parameter', 'bitcast', 'constant', 'while', 'conditional'}
PASSIVE |= {'after-all', 'copy-done', 'slice-done', 'async-done', 'custom-call'}


def memory_reads(text: str, places: dict[str, Place], depth: int) -> int:
  """Return the bytes that the instructions at a depth read from the chip's main memory, once each.

  The compiler writes into each type where the array is: one in `S(1)` is in the vector memory. A
  slice or a gather reads what it returns. An operand of the result's type that a scatter or an
  update replaces is written in place. Kernels (custom calls) are not counted.

  Args:
    text: optimized and scheduled HLO.
    places: as `find_places` returns them.
    depth: number of loops and conditionals around the instructions.
  """
  fused = set(re.findall(r'(?:calls|to_apply)=%?([\w.\-]+)', text))
  types = dict(re.findall(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) [a-z][\w\-]*\(', text, re.M))
  total = 0
  for inside, result, operation, line in instructions(text):
    if operation in PASSIVE or inside in fused or inside not in places:
      continue
    if places[inside].depth != depth:
      continue
    name = re.match(r'\s+(?:ROOT )?%?([\w.\-]+) =', line)[1]
    listed = line.split(f' {operation}(', 1)[1].split(')', 1)[0]
    operands = [types.get(x, '') for x in re.findall(r'%([\w.\-]+)', listed)]
    if operation.startswith(('slice', 'dynamic-slice', 'gather')) or 'gather' in name:
      total += _returned(result) if any(map(main_memory_bytes, operands)) else 0
      continue
    in_place = 'scatter' in name or 'update' in name
    total += sum(main_memory_bytes(x) for x in operands if not (in_place and x == result))
  return total


def main_memory_bytes(shapes: str) -> int:
  """Return the bytes of the arrays of an HLO type that are in the chip's main memory."""
  arrays = re.findall(r'\b[a-z]+\d*\[[\d,]*\](?:\{[^}]*\})?', shapes)
  return sum(sum(shape_bytes(array)) for array in arrays if 'S(1)' not in array)


def _returned(shapes: str) -> int:
  """Return the bytes of a result; of an asynchronous start's, those that follow the operand."""
  sizes = shape_bytes(shapes)
  return sizes[1] if shapes.startswith('(') and len(sizes) > 1 else sizes[0]
