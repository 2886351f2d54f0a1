"""The sampler's programs: the prefill of a chunk, and the decode steps of all slots."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cai_jax.model.cache import Cache, Lengths, Prefix, cache_lengths, init_cache
from cai_jax.model.config import ModelConfig
from cai_jax.model.lm import LM
from cai_jax.model.sharding import param_shardings
from cai_jax.model.transformer import abstract_model
from cai_jax.runtime.mesh import BATCH, batch_shards, check_batch, make_mesh
from cai_jax.sampling import device
from cai_jax.sampling.engine import EngineConfig
from experiments.aot import program as programs
from experiments.aot.program import Program, TooLarge, build, local_bytes, placed
from experiments.aot.slices import GIB, Chip, Slice

SEARCHES = 4  # programs compiled, at most, to find the largest number of slots


def host_mesh(sizes: dict[str, int], chips: Slice, part: Slice) -> Mesh:
  """The mesh that launch.py samples on: on several hosts each has `part` of the chips to itself."""
  if chips.hosts > 1:
    sizes = sizes | ({'data': -1, 'fsdp': 1} if sizes['fsdp'] == 1 else {'data': 1, 'fsdp': -1})
  return make_mesh(**sizes, devices=part.devices)


def abstract_lm(config: ModelConfig, mesh: Mesh, dtype: str) -> LM:
  """A model whose parameters are shapes with shardings."""
  shapes = abstract_model(config, dtype, dtype)[1]
  params = placed(shapes, param_shardings(shapes, mesh))
  return LM(config, params, None, mesh, dtype, 'shapes', '')


def abstract_cache(lm: LM, rows: int, lengths: Lengths, spec: P) -> Cache:
  """What `device.allocate` and `device.prefill_prefix` would allocate."""
  init = lambda: init_cache(lm.config, rows, lengths, device.cache_dtype(lm))  # noqa: E731
  form = device.cache_format(lm.mesh, spec)
  formats = tuple((form,) * len(layer) for layer in lengths)
  return placed(jax.eval_shape(init), formats)


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
    check_batch(self.slots, self.lm.mesh, 'slots')
    lengths = cache_lengths(self.lm.config, self.length, self.engine.slack, self.engine.spans)
    return abstract_cache(self.lm, self.slots, lengths, P(*BATCH, 'tensor'))

  def read(self, rows: int, unembeds: bool) -> int:
    """Bytes that a step over `rows` slots must read on each device; `unembeds`: gives logits."""
    lm = self.lm
    # Of a table that is looked up in, a row for each token is read: next to nothing.
    last = 'embed' if lm.config.tied_embeddings else 'head'
    tables = {'embed', 'head'} - ({last} if unembeds else set())
    params = local_bytes({name: x for name, x in lm.params.items() if name not in tables})
    shards = min(rows, batch_shards(lm.mesh)) * lm.mesh.shape['tensor']
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
  chunk = device.Chunk.pack([[]] * batch_shards(lm.mesh), job.slots, size, width)
  chunk = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), chunk)
  entries = abstract_prefixes(lm, job.prefixes)
  cache, kind = job.cache(), device.Kind.of(lm)
  return device.prefill_program(cache).lower(kind, lm.params, cache, entries, chunk)


def build_decode(job: Sampler) -> Program:
  """The decode program of all slots, compiled."""
  read = job.read(job.slots, unembeds=True)
  return build('decode', lower_decode(job), read, step=1, rows=job.slots)


def build_prefill(job: Sampler) -> Program:
  """The prefill program, compiled."""
  shards = batch_shards(job.lm.mesh)
  size, width = job.engine.chunk(job.slots, job.lm.mesh)
  rows = device.piece_count(size, width) * shards
  read = job.read(rows, unembeds=False)
  name = f'prefill {size * shards}'
  return build(name, lower_prefill(job), read, step=0, rows=size * shards)


def largest_slots(job: Sampler, first: Program | TooLarge, limit: float) -> tuple[int, Program]:
  """The most slots that the decode program fits with, in the steps that `EngineConfig.fit` takes.

  Args:
    job: with some number of slots.
    first: its decode program.
    limit: bytes of the chip.

  Raises:
    ValueError: if none were found that fit.
  """
  bucket = 8 * batch_shards(job.lm.mesh)
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


def report(program: Program, chip: Chip, parts: int) -> list[str]:
  """Lines that tell of a program, of which the slice runs so many."""
  told = [
    f'GiB: {programs.sizes(program.memory)}',
    programs.fits(program, chip),
    f'{program.flops / 1e9:.2f} GFLOP and {program.read / GIB:.3f} GiB to read each step',
    *programs.least_time(program, chip, parts),
    *programs.communication(program),
  ]
  return [f'{program.name} (compiled in {program.seconds:.0f} s)', *(f'  {line}' for line in told)]


def study(
  job: Sampler,
  chips: Slice,
  parts: int,
  names: Sequence[str] = ('decode', 'prefill'),
  search: bool = False,
  hlo: pathlib.Path | None = None,
) -> dict[str, Any]:
  """Compiles the programs, prints what they take, and gives it as JSON could have it.

  Args:
    job: what to compile.
    chips: what for.
    parts: of the slice that each run such programs.
    names: of the programs.
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
    f'sampling on {parts} × mesh {", ".join(f"{k}={v}" for k, v in mesh.items())} in {lm.dtype}; '
    f'{job.slots} slots of {job.length} tokens, prefixes of {list(job.prefixes)}\n'
    f'GiB on each chip: {programs.sizes(sizes)}',
    flush=True,
  )
  result = {
    'mesh': mesh,
    'parts': parts,
    'slots': job.slots,
    'length': job.length,
    'prefixes': job.prefixes,
    'bytes': sizes,
    'programs': [],
    'too_large': {},
  }
  if (least := sizes['parameters'] + sizes['prefixes']) > chip.memory:
    print(f'no program fits: {(least - chip.memory) / GIB:.2f} GiB over by the parameters alone')
    return result | {'too_large': dict.fromkeys(names, least)}
  builders = {'decode': build_decode, 'prefill': build_prefill}
  found = {}
  for name in names:
    try:
      found[name] = builders[name](job)
      print('\n'.join(report(found[name], chip, parts)), flush=True)
      result['programs'].append(programs.as_json(found[name], chip))
      if hlo:
        (hlo / f'{name}.hlo').write_text(found[name].text)
    except TooLarge as error:
      found[name] = error
      result['too_large'][name] = error.used
      print(f'{name} does NOT fit: {error.used / GIB:.2f} GiB of {error.limit / GIB:.2f}')
  if search and 'decode' in found:
    most, program = largest_slots(job, found['decode'], chip.memory)
    result['largest'] = {'slots': most, 'memory': program.memory, 'times': program.times(chip)}
    cache = local_bytes(dataclasses.replace(job, slots=most).cache()) + sizes['prefixes']
    print(
      f'largest number of slots that fits: engine.slots={most}, engine.cache_gib={cache / GIB:.2f}'
    )
    print('\n'.join(report(program, chip, parts)), flush=True)
  return result
