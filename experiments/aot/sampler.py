"""Compile the sampler's programs: prefill of a chunk, and decoding in all slots."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from cai_jax.model.attention.cached import CACHED
from cai_jax.model.cache import (
  Cache,
  Pieces,
  PieceTable,
  Prefix,
  RowTable,
  init_states,
  windows_of,
)
from cai_jax.model.config import LayerKind, ModelConfig
from cai_jax.model.lm import LM
from cai_jax.model.quantized.kernel import FULL
from cai_jax.model.quantized_params import abstract_params
from cai_jax.model.sharding import param_shardings
from cai_jax.pipeline.models import sampling_axes
from cai_jax.pipeline.sections import MeshConfig, SamplingMesh
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import batch_shards, check_batch, make_mesh
from cai_jax.sampling import device
from cai_jax.sampling.caches import STATES, cache_bytes, cache_dtype, cache_format, pages_of
from cai_jax.sampling.chunks import piece_count
from cai_jax.sampling.config import EngineConfig
from cai_jax.sampling.step_arrays import Chunk, ModelSpec, Sizes, Slots
from experiments.aot import program as programs
from experiments.aot.program import Program, TooLarge, build, local_bytes, with_shardings
from experiments.aot.slices import GIB, Chip, Slice

SHOWN_ARRAYS = 5  # the largest arrays of a program that does not fit
MAX_SEARCHES = 4  # programs to compile while searching for the largest number of slots


def replica_mesh(config: ConfigDict, chips: Slice) -> tuple[Mesh, int]:
  """Return the mesh that a replica of launch.py samples on, and the number of replicas.

  Args:
    config: the config, which has the meshes.
    chips: the whole slice, each of whose hosts is a process.

  Raises:
    UserError: if the hosts or chips of a replica do not divide evenly.
  """
  given = SamplingMesh(**config.mesh_sampling)
  hosts = chips.hosts if given.processes == -1 else given.processes
  if chips.hosts % hosts:
    raise UserError(f'mesh_sampling.processes={hosts} does not divide {chips.hosts} hosts.')
  sizes = sampling_axes(MeshConfig(**config.mesh), given, chips.hosts)
  return make_mesh(**sizes, devices=chips.first_hosts(hosts).devices), chips.hosts // hosts


def abstract_lm(config: ModelConfig, mesh: Mesh, dtype: str, weights: str = FULL) -> LM:
  """Return a model whose parameters are ShapeDtypeStructs with shardings."""
  shapes = abstract_params(config, dtype, weights)
  params = with_shardings(shapes, param_shardings(shapes, mesh))
  return LM(config, params, None, mesh, dtype, 'shapes', '', weights=weights)


def abstract_pages(
  lm: LM, kind: LayerKind, pages: int, size: int, attention: str, shared: bool
) -> Any:
  """Return the shapes of pages of one layer, of `size` tokens each; see `caches.cache_format`."""
  dtype = cache_dtype(lm)
  if kind.delta:
    attention, block = STATES, jax.eval_shape(lambda: init_states(kind.delta, pages, dtype))
  else:
    init, heads = CACHED[attention].init, (kind.kv_heads, kind.head_dim)
    block = jax.eval_shape(lambda: init(*heads, pages, size, dtype))
  formats = cache_format(lm.mesh, attention, shared)
  return with_shardings(block, jax.tree.unflatten(jax.tree.structure(block), formats))


def abstract_prefixes(lm: LM, tokens: Sequence[int]) -> tuple[Prefix, ...]:
  """Return the shapes of shared prefixes; `tokens` has the cache length of each."""
  length = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(lm.mesh, P()))
  kinds = lm.config.kinds
  pages = lambda n: tuple(abstract_pages(lm, k, 1, n, 'pages', True) for k in kinds)  # noqa: E731
  return tuple(Prefix(pages(n), length) for n in tokens)


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Everything that determines the shapes of the sampling programs.

  Attributes:
    lm: the model, with shapes in place of parameters.
    engine: the engine's settings.
    slots: number of slots.
    length: tokens of a slot's cache.
    prefixes: tokens of each shared prefix's cache.
  """

  lm: LM
  engine: EngineConfig
  slots: int
  length: int
  prefixes: tuple[int, ...]

  def row_pages(self, window: int | None) -> int:
    """Return the largest number of pages of a slot in layers with a window."""
    return pages_of(self.length, window, self.engine.slack, self.engine.page_tokens)

  def cache(self) -> Cache:
    """Return the shapes of a cache that holds all slots at their largest size, in one block."""
    check_batch(self.slots, self.lm.mesh, 'slots')
    size, name = self.engine.page_tokens, self.attention
    pages = [(kind, self.slots * self.row_pages(kind.window)) for kind in self.lm.config.kinds]
    return tuple((abstract_pages(self.lm, *layer, size, name, False),) for layer in pages)

  @property
  def attention(self) -> str:
    """The name of the attention to the cache."""
    return self.engine.choose_attention(self.lm)

  def row_tables(self) -> tuple[RowTable, ...]:
    """Return the shapes of the tables of a step that decodes all slots."""
    groups = batch_shards(self.lm.mesh)
    rows = self.slots // groups

    def table(window):
      pages = self.row_pages(window)
      shapes = (groups, rows * pages), (groups, rows * pages), (groups, rows, pages), (groups, rows)
      return RowTable(*(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes))

    return tuple(map(table, windows_of(self.lm.config)))

  def chunk(self) -> Chunk:
    """Return the shapes of a chunk of prefill."""
    groups, size = batch_shards(self.lm.mesh), self.engine.chunk_sizes(self.slots, self.lm.mesh)[-1]
    pieces = piece_count(size, self.width())
    array = lambda *shape: jax.ShapeDtypeStruct((groups, *shape), jnp.int32)  # noqa: E731

    def table(window):
      pages = array(pieces, self.row_pages(window))
      return PieceTable(array(size), array(size), pages, array(pieces), array(pieces))

    tables = tuple(map(table, windows_of(self.lm.config)))
    return Chunk(*[array(size)] * 3, Pieces(array(pieces), array(), tables))

  def width(self) -> int:
    """Return the number of tokens of a piece."""
    return self.engine.piece_width(self.slots, self.lm.mesh)

  def bytes_read(self, rows: int, tokens: int, has_logits: bool) -> int:
    """Return the bytes that a step must read on each device, of experts only those it uses.

    Args:
      rows: number of slots in the step.
      tokens: number of tokens in the step.
      has_logits: whether the step computes logits.
    """
    lm = self.lm
    # A lookup reads one row of the table per token, which is negligible.
    last = 'embed' if lm.config.tied_embeddings else 'head'
    tables = {'embed', 'head'} - ({last} if has_logits else set())
    params = local_bytes({name: x for name, x in lm.params.items() if name not in tables})
    if lm.config.experts is not None:
      used = lm.config.experts.per_token / lm.config.experts.number
      unused = (1 - used) ** (tokens / batch_shards(lm.mesh))  # the share, with a uniform router
      layers = [layer['mlp'].get('experts', {}) for layer in lm.params['layers'].values()]
      params -= int(unused * local_bytes(layers))
    shards = min(rows, batch_shards(lm.mesh)) * lm.mesh.shape['tensor']
    caches = cache_bytes(lm, self.length, self.engine.slack, self.engine.page_tokens)
    caches = caches * rows // shards
    return params + caches + local_bytes(abstract_prefixes(lm, self.prefixes))


def lower_decode(job: Sampler) -> jax.stages.Lowered:
  """Return the lowered program of a burst of decode steps in all slots."""
  shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)  # noqa: E731
  slots = jax.tree.map(shape, Slots.empty(job.slots))
  return _lower(job, slots, job.row_tables(), None)


def lower_prefill(job: Sampler) -> jax.stages.Lowered:
  """Return the lowered program that prefills a chunk."""
  return _lower(job, None, (), job.chunk())


def _lower(job: Sampler, rows, tables, chunk) -> jax.stages.Lowered:
  count, lm, cache = jax.ShapeDtypeStruct((), jnp.int32), job.lm, job.cache()
  sizes = Sizes(job.engine.longest_burst, job.width(), job.attention)
  entries, spec = abstract_prefixes(lm, job.prefixes), ModelSpec.from_lm(lm)
  return device.step_program(cache, lm.mesh).lower(
    spec, lm.params, cache, entries, rows, tables, chunk, (count, count), sizes
  )


def build_decode(job: Sampler) -> Program:
  """Compile the program of decode steps in all slots."""
  read = job.bytes_read(job.slots, job.slots, has_logits=True)
  return build('decode', lower_decode(job), read, step=1, rows=job.slots)


def build_prefill(job: Sampler) -> Program:
  """Compile the program that prefills a chunk."""
  shards = batch_shards(job.lm.mesh)
  size = job.engine.chunk_sizes(job.slots, job.lm.mesh)[-1]
  rows = piece_count(size, job.width()) * shards
  read = job.bytes_read(rows, size * shards, has_logits=False)
  name = f'prefill {size * shards}'
  return build(name, lower_prefill(job), read, step=0, rows=size * shards)


def largest_slots(job: Sampler, first: Program | TooLarge, limit: float) -> tuple[int, Program]:
  """Search for the largest number of slots with which the decode program fits.

  Args:
    job: with the number of slots to start from.
    first: the decode program of that job.
    limit: memory of the chip in bytes.

  Returns:
    The number of slots, a multiple of what `EngineConfig.fit` allows, and the decode program.

  Raises:
    UserError: if no number of slots that fits was found.
  """
  bucket = 8 * batch_shards(job.lm.mesh)
  slot_bytes = local_bytes(job.cache()) / job.slots
  fixed = local_bytes(job.lm.params) + local_bytes(abstract_prefixes(job.lm, job.prefixes))
  best = first if isinstance(first, Program) else None
  low, high = (job.slots, math.inf) if best else (0, job.slots)
  for _ in range(MAX_SEARCHES):
    # Temporaries grow at most linearly with the slots, so this guess is safe.
    room, each = limit - fixed, slot_bytes
    if best is not None:
      room, each = limit - best.memory['total'], slot_bytes + best.memory['temporary'] / low
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
    raise UserError(f'No number of slots was found that fits; {high} slots do not.')
  return best.rows, best


def describe(program: Program, chip: Chip, parts: int) -> list[str]:
  """Return lines that describe a program that `parts` of the slice each run."""
  lines = [
    f'GiB: {programs.format_sizes(program.memory)}',
    programs.describe_fit(program, chip),
    f'{program.flops / 1e9:.2f} GFLOP and {program.read / GIB:.3f} GiB to read each step',
    f'read from main memory besides kernels: {program.main_memory / GIB:.3f} GiB each step',
    *programs.describe_time(program, chip, parts),
    *programs.describe_communication(program),
  ]
  return [f'{program.name} (compiled in {program.seconds:.0f} s)', *(f'  {line}' for line in lines)]


def _sizes(job: Sampler) -> dict[str, int]:
  """Return the bytes on each chip by kind of array."""
  return {
    'parameters': local_bytes(job.lm.params),
    'cache': local_bytes(job.cache()),
    'prefixes': local_bytes(abstract_prefixes(job.lm, job.prefixes)),
  }


def _compile(job: Sampler, name: str) -> Program | TooLarge:
  """Compile a program by its name, and print what is too large if it does not fit."""
  try:
    return {'decode': build_decode, 'prefill': build_prefill}[name](job)
  except TooLarge as error:
    print(f'{name} does NOT fit: {error.used / GIB:.2f} GiB of {error.limit / GIB:.2f}')
    print('\n'.join(f'  {line}' for line in error.largest[:SHOWN_ARRAYS]), flush=True)
    return error


def study(
  job: Sampler,
  chips: Slice,
  parts: int,
  names: Sequence[str] = ('decode', 'prefill'),
  search: bool = False,
  hlo: pathlib.Path | None = None,
) -> dict[str, Any]:
  """Compile the programs, print their memory and time, and return them as JSON data.

  Args:
    job: what to compile.
    chips: the slice to compile for.
    parts: number of parts of the slice that each run these programs.
    names: programs to compile.
    search: whether to search for the largest number of slots as well.
    hlo: folder for the compiled programs as text.
  """
  lm, chip = job.lm, chips.chip
  sizes = _sizes(job)
  mesh = dict(lm.mesh.shape)
  print(
    f'sampling on {parts} × mesh {", ".join(f"{k}={v}" for k, v in mesh.items())} in {lm.dtype}; '
    f'{job.slots} slots of {job.length} tokens, prefixes of {list(job.prefixes)}\n'
    f'GiB on each chip: {programs.format_sizes(sizes)}',
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
  if (minimum := sizes['parameters'] + sizes['prefixes']) > chip.memory:
    excess = (minimum - chip.memory) / GIB
    print(f'no program fits: the parameters alone exceed the memory by {excess:.2f} GiB')
    return result | {'too_large': dict.fromkeys(names, minimum)}
  compiled: dict[str, Program | TooLarge] = {}
  for name in names:
    program = compiled[name] = _compile(job, name)
    if isinstance(program, TooLarge):
      result['too_large'][name] = program.used
      continue
    print('\n'.join(describe(program, chip, parts)), flush=True)
    result['programs'].append(programs.as_json(program, chip))
    if hlo:
      (hlo / f'{name}.hlo').write_text(program.text)
  if search and 'decode' in compiled:
    slots, program = largest_slots(job, compiled['decode'], chip.memory)
    result['largest'] = {'slots': slots, 'memory': program.memory, 'times': program.times(chip)}
    cache = local_bytes(dataclasses.replace(job, slots=slots).cache()) + sizes['prefixes']
    print(
      f'largest number of slots that fits: engine.slots={slots}, engine.cache_gib={cache / GIB:.2f}'
    )
    print('\n'.join(describe(program, chip, parts)), flush=True)
  return result
