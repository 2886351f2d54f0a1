"""One program compiled for a slice, and what can be told of it."""

import dataclasses
import math
import re
import time
from collections.abc import Iterator
from typing import Any

import jax

from experiments.aot import hlo
from experiments.aot.hlo import COLLECTIVES, Collective
from experiments.aot.slices import GIB, Chip

KINDS = ('argument', 'output', 'alias', 'temporary', 'code', 'total')


@dataclasses.dataclass(frozen=True)
class Program:
  """What is known of a compiled program; bytes and FLOPs are of one device."""

  name: str
  seconds: float  # to compile
  memory: dict[str, int]  # bytes of KINDS
  counted: float  # FLOPs by the compiler's cost analysis, which counts a loop's body once
  flops: float  # of one step
  read: float  # bytes that a step cannot help moving to and from memory
  collectives: tuple[Collective, ...]
  copies: dict[int, int]  # bytes of large copies by depth
  step: int | None  # depth of what happens each step; less is once a run, more is now and then.
  # None: a run is one step, with all of its loops.
  rows: int  # tokens that one step of all devices gives or takes in
  text: str  # HLO, optimised and scheduled

  def in_step(self, depth: int) -> bool:
    """Whether what stands at this depth happens in each step."""
    return self.step is None or depth == self.step

  def times(self, chip: Chip) -> dict[str, float]:
    """Seconds that a step needs, at least, of compute, memory and links."""
    found = [c for c in self.collectives if self.in_step(c.depth)]
    # The sampler's step is one turn of its loop; loops within a train step run in full.
    sent = sum(c.sent * (c.runs if self.step is None else 1) for c in found)
    return {
      'compute': self.flops / chip.flops,
      'memory': self.read / chip.bandwidth,
      'links': sent / chip.links,
    }


class TooLarge(Exception):
  """A program that the compiler found no room for.

  Attributes:
    used: bytes that it would take.
    limit: bytes that there are.
    largest: the compiler's words on its largest arrays.
  """

  def __init__(self, message: str):
    super().__init__(message)
    sizes = re.findall(r'\b([\d.]+)([KMG])\b', message)
    found = [float(number) * {'K': 2**10, 'M': 2**20, 'G': 2**30}[unit] for number, unit in sizes]
    self.used, self.limit = (*found, math.nan, math.nan)[:2]
    self.largest = tuple(_largest(message))


def _largest(message: str) -> Iterator[str]:
  """'1.96G f32[128256,4096] jit(step)/…' of the arrays that the compiler lists, largest first."""
  for entry in re.split(r'\n\s*\d+\. Size: ', message)[1:]:
    shape = re.search(r'Shape: (\S+?)(?:\{\S*)?\s', entry)
    source = re.search(r'op_name="([^"]*)"', entry)
    parts = (entry.split()[0], shape[1] if shape else '', source[1] if source else '')
    yield ' '.join(part for part in parts if part)


def placed(shapes: Any, shardings: Any) -> Any:
  """The tree of ShapeDtypeStructs with these shardings."""
  place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
  return jax.tree.map(place, shapes, shardings)


def local_bytes(tree: Any) -> int:
  """Bytes that one device holds of a tree of ShapeDtypeStructs with shardings."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


def build(
  name: str,
  lowered: jax.stages.Lowered,
  read: float,
  step: int | None,
  rows: int,
  flops: float | None = None,
) -> Program:
  """Compiles a program and looks at it; the arguments are fields of Program.

  Raises:
    TooLarge: if the chip's memory is too small for it.
  """
  begin = time.perf_counter()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' in str(error):
      raise TooLarge(str(error)) from error
    raise
  seconds, found = time.perf_counter() - begin, compiled.memory_analysis()
  memory = {
    'argument': found.argument_size_in_bytes,
    'output': found.output_size_in_bytes,
    'alias': found.alias_size_in_bytes,
    'temporary': found.temp_size_in_bytes,
    'code': found.generated_code_size_in_bytes,
  }
  # What is donated is counted as an argument and as an output, and is there once.
  memory['total'] = sum(memory.values()) - 2 * memory['alias']
  text, counted = compiled.as_text(), compiled.cost_analysis()['flops']
  places = hlo.find_places(text)
  return Program(
    name=name,
    seconds=seconds,
    memory=memory,
    counted=counted,
    flops=counted if flops is None else flops,
    read=read,
    collectives=tuple(hlo.find_collectives(text, places)),
    copies=hlo.large_copies(text, places),
    step=step,
    rows=rows,
    text=text,
  )


def sizes(memory: dict[str, float]) -> str:
  """'argument 1.250, output 0.001': GiB of each."""
  return ', '.join(f'{name} {size / GIB:.3f}' for name, size in memory.items())


def fits(program: Program, chip: Chip) -> str:
  """'fits 15.75 GiB: yes', or by how much not."""
  over = program.memory['total'] - chip.memory
  return f'fits {chip.memory / GIB:.2f} GiB: {f"NO, {over / GIB:.2f} over" if over > 0 else "yes"}'


def least_time(program: Program, chip: Chip, parts: int = 1) -> list[str]:
  """Lines with the least times of a program, of which the slice runs so many."""
  times = program.times(chip)
  at_least, row = max(times.values()), sum(times.values())
  return [
    'least time: '
    + ', '.join(f'{name} {1e3 * t:.3f} ms' for name, t in times.items())
    + f'; a step {1e3 * at_least:.3f} ms, in a row {1e3 * row:.3f} ms',
    f'tokens/s of the slice, at most {parts * program.rows / at_least:,.0f}, in a row '
    f'{parts * program.rows / row:,.0f}',
  ]


def by_place(program: Program) -> Iterator[tuple[str, list[Collective], int]]:
  """(when, collectives, bytes copied) of what a program does once, each step, and now and then."""
  if program.step is None:
    yield 'each step', list(program.collectives), sum(program.copies.values())
    return
  for where, sign in (('once a run', -1), ('each step', 0), ('in a branch', 1)):
    here = lambda depth, sign=sign: (depth > program.step) - (depth < program.step) == sign  # noqa: E731
    found = [c._replace(runs=1) for c in program.collectives if here(c.depth)]
    yield where, found, sum(size for depth, size in program.copies.items() if here(depth))


def communication(program: Program) -> list[str]:
  """Lines that tell of collectives, by kind and when, and of copies."""
  lines = []
  for where, found, copied in by_place(program):
    for kind in COLLECTIVES:
      some = [(c.runs, c.runs * c.bytes) for c in found if c.kind == kind]
      if some:
        count, size = map(sum, zip(*some, strict=True))
        lines.append(f'{where}: {count} {kind}, {size / 2**20:.3f} MiB')
    if copied:
      lines.append(f'{where}: copies of {copied / 2**20:.1f} MiB')
  for c in sorted(program.collectives, key=lambda c: -c.bytes * c.runs)[:3]:
    often = f'{c.runs} × ' if c.runs > 1 else ''
    lines.append(
      f'largest: {often}{c.kind} of {c.bytes / 2**20:.3f} MiB over {c.group}, {c.source}'
    )
  return lines


def as_json(program: Program, chip: Chip) -> dict[str, Any]:
  """All that is known of a program but its text."""
  collectives = [c._asdict() | {'sent': c.sent} for c in program.collectives]
  found = dataclasses.asdict(program)
  del found['text']
  return found | {'times': program.times(chip), 'collectives': collectives}
