"""Does a config's model fit a TPU slice, and how fast could it run there? Asked without a TPU.

Command:   pip install 'jax[tpu]==JAX_VERSION'   (of the jax at hand: libtpu has the compiler)
           python -m experiments.compile_for_tpu --config=configs/llama3_8b_v5e.py \\
             --topology=v5e:4x4
Hardware:  any CPU; an 8B model takes 2 GB and some minutes, --layers=2 one
Method:    the sampler's prefill and decode programs are compiled from shapes alone: nothing is
           allocated, and no weights are needed. As in launch.py each host samples on its own chips,
           so what is compiled is one host's part of the slice; --mesh takes the whole slice.
Prints:    per device: bytes of each kind, whether they fit, FLOPs, collectives, copies; the least
           time that a decode step and a prefill chunk can take; the largest number of slots.

Reading it: bytes and `fits` are the compiler's. FLOPs are those of its cost analysis, which counts
a loop's body once and so one decode step. The least time is the largest of FLOPs / peak, bytes that
must be read (parameters, caches, prefixes) / bandwidth, and bytes that collectives must send /
bandwidth of all links; real steps take longer. 'In a row' adds the three, as if nothing overlapped.
"""

import argparse
import dataclasses
import importlib.util
import math
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

if __name__ == '__main__':  # libtpu and jax read these when they are loaded
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # no chip is taken: share the compiler
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # ask no cloud's server what machine this is
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('TPU_WORKER_ID', '0')

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cai_jax import parallel
from cai_jax.manifest import write_json
from cai_jax.model import config as model_configs
from cai_jax.model import weights
from cai_jax.model.cache import Cache, Lengths, Prefix, cache_lengths, init_cache
from cai_jax.model.config import ModelConfig
from cai_jax.model.lm import LM
from cai_jax.sampling import device
from cai_jax.sampling.engine import EngineConfig

GIB = 2**30


class Chip(NamedTuple):
  """What one chip can do, by cloud.google.com/tpu/docs/v5e, v5p and v6e."""

  memory: float  # bytes of its 16, 95 or 32 GiB that a program may use, as libtpu 0.0.42 says
  flops: float  # FLOP/s in bf16
  bandwidth: float  # bytes/s of HBM
  links: float  # bytes/s that all its links together send; half of the 'bidirectional' figure
  cores: int  # that an accelerator type's name counts of each chip
  type: str  # such names begin with it


CHIPS = {
  'v5e': Chip(15.75 * GIB, 197e12, 819e9, 200e9, 1, 'v5litepod'),
  'v5p': Chip(95.74 * GIB, 459e12, 2765e9, 600e9, 2, 'v5p'),
  'v6e': Chip(31.25 * GIB, 918e12, 1600e9, 400e9, 1, 'v6e'),
}

# config.json of models that configs name, as far as it says their shape: no network is needed.
MODELS = {
  'meta-llama/Meta-Llama-3-8B-Instruct': {
    'model_type': 'llama',
    'vocab_size': 128256,
    'hidden_size': 4096,
    'intermediate_size': 14336,
    'num_hidden_layers': 32,
    'num_attention_heads': 32,
    'num_key_value_heads': 8,
    'max_position_embeddings': 8192,
    'rope_theta': 500000.0,
    'rms_norm_eps': 1e-5,
  },
}

BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2}
BYTES |= {'f32': 4, 's32': 4, 'u32': 4, 'f64': 8, 's64': 8, 'u64': 8}
COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
LARGE_COPY = 2**20  # bytes from which a copy is counted
SEARCHES = 4  # programs compiled, at most, to find the largest number of slots


@dataclasses.dataclass(frozen=True)
class Slice:
  """The chips to compile for."""

  name: str
  chip: Chip
  devices: tuple[Any, ...]

  @property
  def hosts(self) -> int:
    """Processes that the slice runs."""
    return len({d.process_index for d in self.devices})

  def of_host(self) -> 'Slice':
    """One host's part."""
    if self.hosts == 1:
      return self
    first = self.devices[0].process_index
    places = [d.coords for d in self.devices if d.process_index == first]
    dimensions = self.name.count('x') + 1
    sizes = [len({place[axis] for place in places}) for axis in range(dimensions)]
    # Compiled for on its own, as libtpu numbers a program's chips from 0 without gaps.
    return find_slice(f'{self.name.partition(":")[0]}:{"x".join(map(str, sizes))}')


class Collective(NamedTuple):
  """One collective of a compiled program."""

  kind: str  # of COLLECTIVES
  bytes: int  # of its result on a device
  group: int  # devices that take part together
  depth: int  # loops and conditionals around it
  source: str  # the operation it came from

  @property
  def sent(self) -> float:
    """Bytes that each device has to send, at least: those of a ring."""
    n = self.group
    share = {'all-reduce': 2 * (n - 1) / n, 'reduce-scatter': n - 1, 'collective-permute': 1}
    return self.bytes * share.get(self.kind, (n - 1) / n)


@dataclasses.dataclass(frozen=True)
class Program:
  """What is known of a compiled program; bytes and FLOPs are of one device."""

  name: str
  seconds: float  # to compile
  memory: dict[str, int]  # bytes: argument, output, alias, temporary, code and total
  flops: float  # of one step
  read: int  # bytes of parameters, caches and prefixes that a step cannot help reading
  collectives: tuple[Collective, ...]
  copies: dict[int, int]  # bytes of large copies by depth
  step: int  # depth of what happens each step; less deep is once a run, deeper is now and then
  rows: int  # tokens that one step of all devices gives or takes in
  text: str  # HLO, optimised and scheduled

  def times(self, chip: Chip) -> dict[str, float]:
    """Seconds that a step needs, at least, of compute, memory and links."""
    sent = sum(c.sent for c in self.collectives if c.depth == self.step)
    return {
      'compute': self.flops / chip.flops,
      'memory': self.read / chip.bandwidth,
      'links': sent / chip.links,
    }


class TooLarge(Exception):
  """A program that the compiler found no room for; `used` is what it would take, in bytes."""

  def __init__(self, message: str):
    super().__init__(message)
    sizes = re.findall(r'\b([\d.]+)([KMG])\b', message)
    found = [float(number) * {'K': 2**10, 'M': 2**20, 'G': 2**30}[unit] for number, unit in sizes]
    self.used, self.limit = (*found, math.nan, math.nan)[:2]


def find_slice(name: str) -> Slice:
  """The chips of a topology such as 'v5e:4x4'.

  Raises:
    ValueError: for a chip that is not in CHIPS, a shape that libtpu does not know, or without it.
  """
  kind, _, shape = name.partition(':')
  if kind not in CHIPS or not re.fullmatch(r'\d+(x\d+)*', shape):
    raise ValueError(f'topology {name!r}: give one of {", ".join(CHIPS)} and a shape: v5e:4x4.')
  if importlib.util.find_spec('libtpu') is None and 'TPU_LIBRARY_PATH' not in os.environ:
    raise ValueError(
      'libtpu, which compiles for TPUs, is not installed: '
      f"pip install 'jax[tpu]=={jax.__version__}'"
    )
  chip = CHIPS[kind]
  cores = chip.cores * math.prod(map(int, shape.split('x')))
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', f'{chip.type}-{cores}')
  try:
    found = topologies.get_topology_desc(platform='tpu', topology_name=name)
  except Exception as error:  # the kind depends on what is wrong
    raise ValueError(f'libtpu has no topology {name!r}: {error}') from error
  return Slice(name, chip, tuple(found.devices))


def find_model(name: str, path: str | None = None) -> ModelConfig:
  """The shape of a model, without its weights.

  Args:
    name: as a config names it: one of MODELS, or a folder.
    path: a config.json, or the folder that has one, instead.

  Raises:
    ValueError: if neither is known.
  """
  if path is None and name in MODELS:
    return model_configs.from_hf(MODELS[name])
  place = pathlib.Path(path or name).expanduser()
  place = place / 'config.json' if place.is_dir() else place
  if not place.is_file():
    raise ValueError(
      f'{str(place)!r} is no config.json, nor a folder with one, and {name!r} is not one of '
      f'{", ".join(MODELS)}: give --model_config=.'
    )
  return model_configs.from_hf(weights.read_json(place))


def host_mesh(sizes: dict[str, int], chips: Slice, part: Slice) -> Mesh:
  """The mesh that launch.py samples on: on several hosts each has `part` of the chips to itself."""
  if chips.hosts > 1:
    sizes = sizes | ({'data': -1, 'fsdp': 1} if sizes['fsdp'] == 1 else {'data': 1, 'fsdp': -1})
  return parallel.make_mesh(**sizes, devices=part.devices)


def abstract_lm(config: ModelConfig, mesh: Mesh, dtype: str) -> LM:
  """A model whose parameters are shapes with shardings."""
  shapes = weights.structure(config, dtype, dtype)[1]
  params = _placed(shapes, parallel.param_shardings(shapes, mesh))
  return LM(config, params, None, mesh, dtype, 'shapes', '')


def abstract_cache(lm: LM, rows: int, lengths: Lengths, spec: P) -> Cache:
  """What `device.allocate` and `device.prefill_prefix` would allocate."""
  init = lambda: init_cache(lm.config, rows, lengths, device.cache_dtype(lm))  # noqa: E731
  form = device.cache_format(lm.mesh, spec)
  formats = tuple((form,) * len(layer) for layer in lengths)
  return _placed(jax.eval_shape(init), formats)


def _placed(shapes, shardings):
  place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
  return jax.tree.map(place, shapes, shardings)


def abstract_prefixes(lm: LM, tokens: Sequence[int]) -> tuple[Prefix, ...]:
  """Shared prefixes in caches of so many tokens."""
  length = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(lm.mesh, P()))
  spec, layers = P(None, 'tensor'), lm.config.num_layers
  return tuple(Prefix(abstract_cache(lm, 1, ((n,),) * layers, spec), length) for n in tokens)


@dataclasses.dataclass(frozen=True)
class Sampler:
  """All that the sampling programs' shapes depend on."""

  lm: LM
  engine: EngineConfig
  slots: int
  length: int  # tokens of a slot's cache
  prefixes: tuple[int, ...]  # tokens of each shared prefix's cache

  def cache(self) -> Cache:
    """Shapes of the slots' caches."""
    parallel.check_batch(self.slots, self.lm.mesh, 'slots')
    lengths = cache_lengths(self.lm.config, self.length, self.engine.slack, self.engine.spans)
    return abstract_cache(self.lm, self.slots, lengths, P(*parallel.BATCH, 'tensor'))

  def read(self, rows: int, unembeds: bool) -> int:
    """Bytes that a step over `rows` slots must read on each device; `unembeds`: gives logits."""
    lm = self.lm
    # Of a table that is looked up in, a row for each token is read: next to nothing.
    last = 'embed' if lm.config.tied_embeddings else 'head'
    tables = {'embed', 'head'} - ({last} if unembeds else set())
    params = local_bytes({name: x for name, x in lm.params.items() if name not in tables})
    shards = min(rows, parallel.batch_shards(lm.mesh)) * lm.mesh.shape['tensor']
    own = device.cache_bytes(lm, self.length, self.engine.slack) * rows // shards
    return params + own + local_bytes(abstract_prefixes(lm, self.prefixes))


def lower_decode(job: Sampler) -> jax.stages.Lowered:
  """The burst of decode steps in all slots."""
  shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)  # noqa: E731
  slots = jax.tree.map(shape, device.Slots.empty(job.slots))
  count, lm = jax.ShapeDtypeStruct((), jnp.int32), job.lm
  entries, width = abstract_prefixes(lm, job.prefixes), job.engine.longest_burst
  cache = job.cache()
  return device.decode_program(cache).lower(
    device.Kind.of(lm), lm.params, cache, entries, slots, count, count, width
  )


def lower_prefill(job: Sampler) -> jax.stages.Lowered:
  """The prefill of a chunk."""
  lm = job.lm
  size, width = job.engine.chunk(job.slots, lm.mesh)
  chunk = device.Chunk.pack([[]] * parallel.batch_shards(lm.mesh), job.slots, size, width)
  chunk = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), chunk)
  entries = abstract_prefixes(lm, job.prefixes)
  cache, kind = job.cache(), device.Kind.of(lm)
  return device.prefill_program(cache).lower(kind, lm.params, cache, entries, chunk)


def build(
  name: str, lower: Callable[[], jax.stages.Lowered], read: int, step: int, rows: int
) -> Program:
  """Compiles a program and looks at it.

  Raises:
    TooLarge: if the chip's memory is too small for it.
  """
  lowered, begin = lower(), time.perf_counter()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' in str(error):
      raise TooLarge(str(error)) from error
    raise
  seconds, found, text = (
    time.perf_counter() - begin,
    compiled.memory_analysis(),
    compiled.as_text(),
  )
  memory = {
    'argument': found.argument_size_in_bytes,
    'output': found.output_size_in_bytes,
    'alias': found.alias_size_in_bytes,
    'temporary': found.temp_size_in_bytes,
    'code': found.generated_code_size_in_bytes,
  }
  # What is donated is counted as an argument and as an output, and is there once.
  memory['total'] = sum(memory.values()) - 2 * memory['alias']
  depths = loop_depths(text)
  return Program(
    name=name,
    seconds=seconds,
    memory=memory,
    flops=compiled.cost_analysis()['flops'],
    read=read,
    collectives=tuple(find_collectives(text, depths)),
    copies=large_copies(text, depths),
    step=step,
    rows=rows,
    text=text,
  )


def build_decode(job: Sampler) -> Program:
  """The decode program of all slots, compiled."""
  read = job.read(job.slots, unembeds=True)
  return build('decode', lambda: lower_decode(job), read, step=1, rows=job.slots)


def build_prefill(job: Sampler) -> Program:
  """The prefill program, compiled."""
  shards = parallel.batch_shards(job.lm.mesh)
  size, width = job.engine.chunk(job.slots, job.lm.mesh)
  rows = device.piece_count(size, width) * shards
  read = job.read(rows, unembeds=False)
  name = f'prefill {size * shards}'
  return build(name, lambda: lower_prefill(job), read, step=0, rows=size * shards)


def local_bytes(tree) -> int:
  """Bytes that one device holds of a tree of ShapeDtypeStructs with shardings."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


def instructions(text: str) -> Iterator[tuple[str, str, str, str]]:
  """(computation, result type, operation, whole line) of each instruction of an HLO module."""
  inside = ''
  for line in text.splitlines():
    if header := re.match(r'(ENTRY )?%?([\w.\-]+) .*\{$', line):
      inside = 'ENTRY' if header[1] else header[2]
    elif found := re.match(r'\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(', line):
      yield inside, found[1], found[2], line


def loop_depths(text: str) -> dict[str, int]:
  """For each computation the fewest loops and conditionals around it, from the entry on."""
  called: dict[str, list[tuple[str, int]]] = {}
  names = r'(?:calls|body|condition|to_apply|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)'
  for inside, _, operation, line in instructions(text):
    deeper = operation in ('while', 'conditional')
    for group in re.findall(names, line):
      for name in re.findall(r'[\w.\-]+', group):
        called.setdefault(inside, []).append((name, deeper))
  depths, waiting = {'ENTRY': 0}, ['ENTRY']
  while waiting:
    name = waiting.pop()
    for other, deeper in called.get(name, ()):
      depth = depths[name] + deeper
      if depth < depths.get(other, depth + 1):
        depths[other] = depth
        waiting.append(other)
  return depths


def find_collectives(text: str, depths: dict[str, int]) -> Iterator[Collective]:
  """The collectives of an HLO module, each once."""
  seen = set()
  for inside, result, operation, line in instructions(text):
    kind = operation.removesuffix('-start')
    if kind not in COLLECTIVES or inside not in depths:
      continue
    # One that runs in steps beside other work stands in each of the fusions that it runs beside.
    channel = re.search(r'channel_id=(\d+)', line)
    if channel is not None and channel[1] in seen:
      continue
    seen.add(channel[1] if channel else line)
    sizes = shape_bytes(result)
    # Those that are started have their operand, and flags, beside the result.
    beside = operation.endswith('-start') and kind != 'all-reduce'
    source = re.search(r'op_name="([^"]*)"', line)
    yield Collective(
      kind=kind,
      bytes=max(sizes) if beside else sum(sizes),
      group=group_size(line),
      depth=depths[inside],
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


def large_copies(text: str, depths: dict[str, int]) -> dict[int, int]:
  """Bytes that are copied in pieces of LARGE_COPY or more, by depth: a change of layout mostly.

  What stands inside a fusion is not counted: it is no array in memory.
  """
  copied: dict[int, int] = {}
  fused = set(re.findall(r' fusion\(.*calls=%?([\w.\-]+)', text))
  for inside, result, operation, _ in instructions(text):
    size = sum(shape_bytes(result))
    if operation == 'copy' and inside in depths.keys() - fused and size >= LARGE_COPY:
      copied[depths[inside]] = copied.get(depths[inside], 0) + size
  return copied


def largest_slots(job: Sampler, first: Program | TooLarge, limit: float) -> tuple[int, Program]:
  """The most slots that the decode program fits with, in the steps that `EngineConfig.fit` takes.

  Args:
    job: with some number of slots.
    first: its decode program.
    limit: bytes of the chip.

  Raises:
    ValueError: if none were found that fit.
  """
  bucket = 8 * parallel.batch_shards(job.lm.mesh)
  of_slot = local_bytes(job.cache()) / job.slots
  fixed = local_bytes(job.lm.params) + local_bytes(abstract_prefixes(job.lm, job.prefixes))
  best = first if isinstance(first, Program) else None
  low, high = (job.slots, math.inf) if best else (0, job.slots)
  for _ in range(SEARCHES):
    # Temporaries grow with the slots at most: what there is room for by that is there.
    room, each = limit - fixed, of_slot
    if best is not None:
      room, each = limit - best.memory['total'], of_slot + best.memory['temporary'] / low
    guess = (low + room / each) // bucket * bucket
    guess = int(guess if guess < high else (low + high) / 2 // bucket * bucket)
    if guess <= low:
      break
    try:
      best = build_decode(dataclasses.replace(job, slots=guess))
      low = guess
    except TooLarge:
      high = guess
  if best is None:
    raise ValueError(f'no number of slots was found to fit; {high} do not.')
  return best.rows, best


def by_place(program: Program) -> Iterator[tuple[str, list[Collective], int]]:
  """(when, collectives, bytes copied) of what a program does once, each step, and now and then."""
  for where, sign in (('once a run', -1), ('each step', 0), ('in a branch', 1)):
    here = lambda depth, sign=sign: (depth > program.step) - (depth < program.step) == sign  # noqa: E731
    found = [c for c in program.collectives if here(c.depth)]
    yield where, found, sum(size for depth, size in program.copies.items() if here(depth))


def report(program: Program, chip: Chip, parts: int) -> list[str]:
  """Lines that tell of a program, of which the slice runs so many."""
  m, times = program.memory, program.times(chip)
  at_least, row = max(times.values()), sum(times.values())
  gib = lambda name: f'{name} {m[name] / GIB:.3f}'  # noqa: E731
  lines = [
    f'{program.name} (compiled in {program.seconds:.0f} s)',
    '  GiB: ' + ', '.join(map(gib, ('argument', 'output', 'alias', 'temporary', 'code', 'total'))),
    f'  fits {chip.memory / GIB:.2f} GiB: {"yes" if m["total"] <= chip.memory else "NO"}',
    f'  {program.flops / 1e9:.2f} GFLOP and {program.read / GIB:.3f} GiB to read each step',
    '  least time: '
    + ', '.join(f'{name} {1e3 * t:.3f} ms' for name, t in times.items())
    + f'; a step {1e3 * at_least:.3f} ms, in a row {1e3 * row:.3f} ms',
    f'  tokens/s of the slice, at most {parts * program.rows / at_least:,.0f}, in a row '
    f'{parts * program.rows / row:,.0f}',
  ]
  for where, found, copied in by_place(program):
    for kind in COLLECTIVES:
      sizes = [c.bytes for c in found if c.kind == kind]
      if sizes:
        lines.append(f'  {where}: {len(sizes)} {kind}, {sum(sizes) / 2**20:.3f} MiB')
    if copied:
      lines.append(f'  {where}: copies of {copied / 2**20:.1f} MiB')
  for c in sorted(program.collectives, key=lambda c: -c.bytes)[:3]:
    lines.append(f'  largest: {c.kind} of {c.bytes / 2**20:.3f} MiB over {c.group}, {c.source}')
  return lines


def as_json(program: Program, chip: Chip) -> dict[str, Any]:
  """All that is known of a program but its text."""
  collectives = [c._asdict() | {'sent': c.sent} for c in program.collectives]
  found = dataclasses.asdict(program)
  del found['text']
  return found | {'times': program.times(chip), 'collectives': collectives}


def main(argv: Sequence[str] | None = None) -> None:
  """Compiles the sampling programs and prints what they take."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--config', required=True, help='file with get_config()')
  parser.add_argument('--topology', default='v5e:4x4', help='chip and shape of the slice')
  parser.add_argument('--model_config', help='a config.json, for models that are not known here')
  parser.add_argument('--length', type=int, default=1536, help="tokens of a slot's cache")
  parser.add_argument('--prefixes', type=int, nargs='*', default=[512, 512], help='tokens of each')
  parser.add_argument('--slots', type=int, help='of a program; if absent, what the config gives')
  parser.add_argument('--mesh', type=int, nargs=3, help='data fsdp tensor, of the whole slice')
  parser.add_argument('--layers', type=int, help='fewer than the model has, to try something')
  parser.add_argument('--prefill', action=argparse.BooleanOptionalAction, default=True)
  parser.add_argument('--search', action=argparse.BooleanOptionalAction, default=True)
  parser.add_argument('--hlo', type=pathlib.Path, help='folder for the compiled programs as text')
  parser.add_argument('--output', type=pathlib.Path, help='JSON of all that is found')
  args = parser.parse_args(argv)

  config = load_config(args.config)
  chips = find_slice(args.topology)
  model = find_model(config.model.base, args.model_config)
  if args.layers:
    windows = model.windows[: args.layers]
    model = dataclasses.replace(model, num_layers=args.layers, windows=windows)
  if args.mesh:
    parts, mesh = 1, parallel.make_mesh(*args.mesh, devices=chips.devices)
  else:
    parts, mesh = chips.hosts, host_mesh(config.mesh.to_dict(), chips, chips.of_host())
  lm = abstract_lm(model, mesh, config.model.dtype)
  engine = EngineConfig(**config.engine)
  slots = args.slots or engine.fit([lm], args.length, [sum(args.prefixes)])
  job = Sampler(lm, engine, slots, args.length, tuple(args.prefixes))
  result = study(job, chips, parts, args.prefill, args.search, args.hlo)
  if args.output:
    write_json(args.output, result)


def load_config(path: str):
  """What the get_config() of a file gives.

  Raises:
    ValueError: if there is no such file.
  """
  if not pathlib.Path(path).is_file():
    raise ValueError(f'--config={path}: there is no such file.')
  spec = importlib.util.spec_from_file_location('config', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def study(
  job: Sampler,
  chips: Slice,
  parts: int,
  prefill: bool,
  search: bool,
  hlo: pathlib.Path | None,
) -> dict[str, Any]:
  """Compiles all programs, prints what they take, and gives it as JSON could have it.

  Args:
    job: what to compile.
    chips: what for.
    parts: of the slice that each run such programs.
    prefill: whether to compile that as well as decode.
    search: whether to look for the largest number of slots too.
    hlo: folder for the compiled programs as text.
  """
  lm, chip = job.lm, chips.chip
  sizes = {
    'parameters': local_bytes(lm.params),
    'cache': local_bytes(job.cache()),
    'prefixes': local_bytes(abstract_prefixes(lm, job.prefixes)),
  }
  mesh = dict(lm.mesh.shape)
  print(
    f'{chips.name}: {len(chips.devices)} chips of {chips.hosts} hosts; {parts} × mesh '
    f'{", ".join(f"{k}={v}" for k, v in mesh.items())}; jax {jax.__version__}\n'
    f'{lm.config.num_params / 1e9:.3f} billion parameters in {lm.dtype}; {job.slots} slots of '
    f'{job.length} tokens, prefixes of {list(job.prefixes)}\n'
    f'GiB on each chip: ' + ', '.join(f'{k} {v / GIB:.3f}' for k, v in sizes.items()),
    flush=True,
  )
  programs: list[Program] = []
  builders = {'decode': build_decode} | ({'prefill': build_prefill} if prefill else {})
  first, too_large = None, {}
  for name, builder in builders.items():
    try:
      programs.append(builder(job))
      print('\n'.join(report(programs[-1], chip, parts)), flush=True)
      found = programs[-1]
      if hlo:
        hlo.mkdir(parents=True, exist_ok=True)
        (hlo / f'{name.replace(" ", "_")}.hlo').write_text(found.text)
    except TooLarge as error:
      found = too_large[name] = error
      print(f'{name} does NOT fit: {error.used / GIB:.2f} GiB of {error.limit / GIB:.2f}')
    first = found if name == 'decode' else first
  result = {
    'topology': chips.name,
    'mesh': mesh,
    'parts': parts,
    'slots': job.slots,
    'length': job.length,
    'prefixes': job.prefixes,
    'bytes': sizes,
    'programs': [as_json(p, chip) for p in programs],
    'too_large': {name: error.used for name, error in too_large.items()},
  }
  if search:
    most, program = largest_slots(job, first, chip.memory)
    result['largest'] = {'slots': most, 'memory': program.memory, 'times': program.times(chip)}
    cache = local_bytes(dataclasses.replace(job, slots=most).cache()) + sizes['prefixes']
    print(
      f'largest number of slots that fits: engine.slots={most}, engine.cache_gib={cache / GIB:.2f}'
    )
    print('\n'.join(report(program, chip, parts)), flush=True)
  return result


if __name__ == '__main__':
  main()
