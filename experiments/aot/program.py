"""Compile one program for a slice, and describe its memory, time and communication."""

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
  """A compiled program. Bytes and FLOPs are those of one device.

  Attributes:
    name: of the program.
    seconds: time to compile.
    cpu_seconds: CPU time of that, over all threads.
    memory: bytes of each of KINDS.
    counted: FLOPs by the compiler's cost analysis, which counts the body of a loop once.
    flops: FLOPs of one step.
    read: the least number of bytes that a step moves to and from memory.
    accessed: bytes that operations read and write by the compiler's cost analysis, which counts the
      body of a loop once and no Pallas kernel. It counts the vector memory, too.
    main_memory: bytes that instructions of a step read from the chip's main memory, kernels and
      branches excluded.
    collectives: all collectives.
    copies: bytes of large copies, by depth.
    step: the depth of operations that happen in every step. Those at smaller depths happen once per
      run, those at larger ones only in some steps. None if a run is one step with all of its loops.
    rows: number of tokens that one step of all devices samples or processes.
    text: optimized and scheduled HLO.
  """

  name: str
  seconds: float
  cpu_seconds: float
  memory: dict[str, int]
  counted: float
  flops: float
  read: float
  accessed: float
  main_memory: float
  collectives: tuple[Collective, ...]
  copies: dict[int, int]
  step: int | None
  rows: int
  text: str

  def in_step(self, depth: int) -> bool:
    """Return whether operations at this depth happen in every step."""
    return self.step is None or depth == self.step

  def times(self, chip: Chip) -> dict[str, float]:
    """Return lower bounds on a step's time, in seconds, by compute, memory and links."""
    collectives = [c for c in self.collectives if self.in_step(c.depth)]
    # A step of the sampler is one iteration of its loop; the loops of a train step run in full.
    sent = sum(c.sent * (c.runs if self.step is None else 1) for c in collectives)
    return {
      'compute': self.flops / chip.flops,
      'memory': self.read / chip.bandwidth,
      'links': sent / chip.links,
    }


class TooLarge(Exception):
  """A program that does not fit the chip's memory.

  Attributes:
    used: bytes that the program needs.
    limit: bytes that the chip has.
    largest: the compiler's descriptions of the largest arrays.
  """

  def __init__(self, message: str):
    super().__init__(message)
    sizes = re.findall(r'\b([\d.]+)([KMG])\b', message)
    counts = [float(number) * {'K': 2**10, 'M': 2**20, 'G': 2**30}[unit] for number, unit in sizes]
    self.used, self.limit = (*counts, math.nan, math.nan)[:2]
    self.largest = tuple(_largest_arrays(message))


def _largest_arrays(message: str) -> Iterator[str]:
  """Yield lines such as '1.96G f32[128256,4096] jit(step)/…', the largest array first."""
  for entry in re.split(r'\n\s*\d+\. Size: ', message)[1:]:
    shape = re.search(r'Shape: (\S+?)(?:\{\S*)?\s', entry)
    source = re.search(r'op_name="([^"]*)"', entry)
    parts = (entry.split()[0], shape[1] if shape else '', source[1] if source else '')
    yield ' '.join(part for part in parts if part)


def with_shardings(shapes: Any, shardings: Any) -> Any:
  """Return the tree of ShapeDtypeStructs with the given shardings."""
  place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
  return jax.tree.map(place, shapes, shardings)


def local_bytes(tree: Any) -> int:
  """Return the bytes that one device holds of a tree of ShapeDtypeStructs with shardings."""
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
  """Compile a program and analyse it.

  Args:
    name, read, step, rows, flops: fields of `Program`. By default `flops` is the compiler's count.
    lowered: the program.

  Raises:
    TooLarge: if it does not fit the chip's memory.
  """
  start, cpu_start = time.perf_counter(), time.process_time()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' in str(error):
      raise TooLarge(str(error)) from error
    raise
  seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
  analysis = compiled.memory_analysis()
  memory = {
    'argument': analysis.argument_size_in_bytes,
    'output': analysis.output_size_in_bytes,
    'alias': analysis.alias_size_in_bytes,
    'temporary': analysis.temp_size_in_bytes,
    'code': analysis.generated_code_size_in_bytes,
  }
  # A donated array counts both as an argument and as an output, but exists once.
  memory['total'] = sum(memory.values()) - 2 * memory['alias']
  text, costs = compiled.as_text(), compiled.cost_analysis()
  counted = costs['flops']
  places = hlo.find_places(text)
  return Program(
    name=name,
    seconds=seconds,
    cpu_seconds=cpu_seconds,
    memory=memory,
    counted=counted,
    flops=counted if flops is None else flops,
    read=read,
    accessed=costs['bytes accessed'],
    main_memory=hlo.memory_reads(text, places, step or 0),
    collectives=tuple(hlo.find_collectives(text, places)),
    copies=hlo.large_copies(text, places),
    step=step,
    rows=rows,
    text=text,
  )


def format_sizes(memory: dict[str, float]) -> str:
  """Return sizes in GiB, such as 'argument 1.250, output 0.001'."""
  return ', '.join(f'{name} {size / GIB:.3f}' for name, size in memory.items())


def describe_fit(program: Program, chip: Chip) -> str:
  """Return a text such as 'fits 15.75 GiB: yes', or by how much the program does not fit."""
  over = program.memory['total'] - chip.memory
  return f'fits {chip.memory / GIB:.2f} GiB: {f"NO, {over / GIB:.2f} over" if over > 0 else "yes"}'


def describe_time(program: Program, chip: Chip, parts: int = 1) -> list[str]:
  """Return lines with lower bounds on the time of a program that `parts` of the slice each run."""
  times = program.times(chip)
  bound, total = max(times.values()), sum(times.values())
  return [
    'at least: '
    + ', '.join(f'{name} {1e3 * t:.3f} ms' for name, t in times.items())
    + f'; a step {1e3 * bound:.3f} ms, without overlap {1e3 * total:.3f} ms',
    f'tokens/s of the slice: at most {parts * program.rows / bound:,.0f}, without overlap '
    f'{parts * program.rows / total:,.0f}',
  ]


def group_by_frequency(program: Program) -> Iterator[tuple[str, list[Collective], int]]:
  """Yield (when, collectives, copied bytes) for once per run, every step, and some steps."""
  if program.step is None:
    yield 'each step', list(program.collectives), sum(program.copies.values())
    return
  for when, sign in (('once per run', -1), ('each step', 0), ('in a branch', 1)):
    here = lambda depth, sign=sign: (depth > program.step) - (depth < program.step) == sign  # noqa: E731
    collectives = [c._replace(runs=1) for c in program.collectives if here(c.depth)]
    yield when, collectives, sum(size for depth, size in program.copies.items() if here(depth))


def describe_communication(program: Program) -> list[str]:
  """Return lines with the number and bytes of collectives and copies."""
  lines = []
  for when, collectives, copied in group_by_frequency(program):
    for kind in COLLECTIVES:
      totals = [(c.runs, c.runs * c.bytes) for c in collectives if c.kind == kind]
      if totals:
        count, size = map(sum, zip(*totals, strict=True))
        lines.append(f'{when}: {count} {kind}, {size / 2**20:.3f} MiB')
    if copied:
      lines.append(f'{when}: copies of {copied / 2**20:.1f} MiB')
  for c in sorted(program.collectives, key=lambda c: -c.bytes * c.runs)[:3]:
    repeats = f'{c.runs} × ' if c.runs > 1 else ''
    lines.append(
      f'largest: {repeats}{c.kind} of {c.bytes / 2**20:.3f} MiB over {c.group}, {c.source}'
    )
  return lines


def as_json(program: Program, chip: Chip) -> dict[str, Any]:
  """Return everything about a program except its text, as JSON data."""
  collectives = [c._asdict() | {'sent': c.sent} for c in program.collectives]
  fields = dataclasses.asdict(program)
  del fields['text']
  return fields | {'times': program.times(chip), 'collectives': collectives}
