"""The step on the device, and the bursts of steps.

A step is one pass of the model over a flat batch of tokens: the next token of each decoded row, and
prefilled tokens of rows that wait. A row is a slot that takes part; there are programs for a few
numbers of rows, so that idle slots cost little. Without prefill, a burst of steps runs.

On one CPU device a step runs as several programs: those of `cai_jax.sampling.burst` and of
`cai_jax.model.cached_forward`. Elsewhere the whole burst is a single program, because each start of
a program costs time on the host.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cai_jax.model.cache import (
  Cache,
  Pieces,
  PieceTable,
  Prefix,
  Prefixes,
  RowTable,
  Step,
  windows_of,
)
from cai_jax.model.cached_forward import ForwardSpec, Usage, forward_cached
from cai_jax.model.lm import LM
from cai_jax.model.transformer import Params
from cai_jax.runtime.compilation import jit_on
from cai_jax.runtime.mesh import batch_sharding, batch_shards, is_split
from cai_jax.sampling import burst
from cai_jax.sampling.caches import allocate_prefix
from cai_jax.sampling.penalties import Penalties
from cai_jax.sampling.step_arrays import Burst, Chunk, ModelSpec, Sizes, Slots, runs_in_parts
from cai_jax.sampling.usage import new_usage


def run(
  spec: ModelSpec,
  params: Params,
  cache: Cache,
  prefix_caches: tuple[Prefix, ...],
  rows: Slots | None,
  tables: tuple[RowTable, ...],
  chunk: Chunk | None,
  limits: tuple[np.ndarray, np.ndarray],
  sizes: Sizes,
  penalties: Penalties | None = None,
  text: np.ndarray | None = None,
  usage: Usage = (),
) -> tuple[Burst | jax.Array, Cache, Usage]:
  """Run one step with prefill, or a burst of steps without.

  Args:
    spec: the properties for which the model is compiled.
    params: the model's parameters.
    cache: the cache; donated.
    prefix_caches: all shared prefixes of the model.
    rows: the state of the rows; None only prefills.
    tables: the pages of the rows, for each window that layers have.
    chunk: the tokens to prefill; None decodes only.
    limits: two i32[]: stop once so many replies have ended, and once a row has sampled so many
      tokens.
    sizes: static sizes.
    penalties: biases and penalties of the rows; None compiles a program without any.
    text: i32[B,L], context and reply of each row, where entries beyond its position are undefined.
      Penalties and drafts need it.
    usage: how often experts were used so far; () does not count it.

  Returns:
    The sampled tokens, or without rows an array [] that is ready at the same time; and the updated
    cache and usage.
  """
  program = _run_parts if runs_in_parts(spec.mesh) else step_program(cache, spec.mesh)
  return program(
    spec, params, cache, prefix_caches, rows, tables, chunk, limits, sizes, penalties, text, usage
  )


def step_program(cache: Cache, mesh: Mesh) -> Callable:
  """Return `run` as one program, jitted, for a cache of arrays or ShapeDtypeStructs on a mesh.

  If the mesh is split over processes, each of them gets the whole burst.
  """
  examples = {type(blocks[0]): blocks[0] for blocks in cache}  # other layers have the same formats
  formats: Any = {kind: jax.tree.map(lambda x: x.format, block) for kind, block in examples.items()}
  result = NamedSharding(mesh, P()) if is_split(mesh) else None
  outputs = result, tuple((formats[type(blocks[0])],) * len(blocks) for blocks in cache), None
  platform = mesh.devices.flat[0].platform
  static = 'spec', 'sizes'
  return jit_on(
    platform, _run, static_argnames=static, donate_argnames='cache', out_shardings=outputs
  )


def _run(
  spec,
  params,
  cache,
  prefix_caches,
  rows,
  tables,
  chunk,
  limits,
  sizes,
  penalties=None,
  text=None,
  usage=(),
  loop=jax.lax.while_loop,
):
  """Compute `run`, within `jax.jit` or with `loop=_loop` outside of it."""

  def forward(cache, usage, batch):
    step = Step(tables, None if chunk is None else chunk.pieces)
    tokens, positions, choice = batch
    prefixes = Prefixes(prefix_caches, choice)
    forward_spec = _forward_spec(spec, len(tokens), sizes)
    return forward_cached(forward_spec, params, tokens, positions, cache, step, prefixes, usage)

  if rows is None:
    _, cache, usage = forward(cache, usage, (chunk.tokens, chunk.positions, chunk.prefix))
    return _read_entry(cache[-1][0]), cache, usage
  rows = Slots(*rows)
  outer = {name: value for name, value in params.items() if name != 'layers'}

  def step(carry):
    cache, state, usage = carry
    draft, batch = burst.feed(spec, sizes, state, chunk)
    hidden, cache, usage = forward(cache, usage, batch)
    hidden = burst.select_hidden(sizes, hidden, draft)
    state = burst.take(spec, sizes, outer, hidden, draft, state, penalties, rows.active, limits)
    return cache, state, usage

  carry = cache, burst.begin(spec, sizes, rows, limits, penalties, text), usage
  carry = loop(lambda carry: carry[1].unfinished, step, carry) if chunk is None else step(carry)
  cache, state, usage = carry
  return state.burst, cache, usage


def _loop(condition, body, carry):
  """Compute `jax.lax.while_loop` outside of a program."""
  while condition(carry):
    carry = body(carry)
  return carry


_run_parts = functools.partial(_run, loop=_loop)


@jax.jit
def _read_entry(block):
  """Return the first entry of a block's first array."""
  return block[0][(0,) * block[0].ndim]


def _forward_spec(spec: ModelSpec, groups: int, sizes: Sizes) -> ForwardSpec:
  # The prefill of a shared prefix has a single group, which every device computes as a whole.
  is_split = groups == batch_shards(spec.mesh)
  sharding = batch_sharding(spec.mesh) if is_split else NamedSharding(spec.mesh, P())
  return ForwardSpec(spec.config, spec.dtype, sharding, sizes.width, sizes.attention)


def prefill_prefix(
  lm: LM, tokens: list[int], capacity: int, size: int, width: int
) -> tuple[Prefix, Usage]:
  """Compute the keys and values of a shared prefix, replicated over batch shards.

  Args:
    lm: the model.
    tokens: token ids, at most `capacity`.
    capacity: number of tokens that the prefix's cache can hold.
    size: number of tokens per prefill chunk.
    width: number of tokens that attention processes together.

  Returns:
    The prefix, and how often its tokens used each expert, with G = 1.

  Raises:
    UserError: if the mesh does not divide the number of key-value heads.
  """
  usage = new_usage(lm.config, NamedSharding(lm.mesh, P()), 1)
  cache: Cache = tuple((layer,) for layer in allocate_prefix(lm, capacity))
  spec, zero = ModelSpec.from_lm(lm), np.zeros((), np.int32)
  for start in range(0, len(tokens), size):
    part = tokens[start : start + size]
    positions = np.full((1, size), -1, np.int32)
    positions[0, : len(part)] = np.arange(start, start + len(part))
    padded = np.zeros((1, size), np.int32)
    padded[0, : len(part)] = part
    pieces = np.arange(0, size, width, dtype=np.int32)[None]
    count = -(-len(part) // width)
    table = PieceTable(
      page=np.where(positions < 0, 1, 0),  # type: ignore[arg-type]  # numpy arrays
      offset=np.maximum(positions, 0),  # type: ignore[arg-type]
      pages=np.zeros((*pieces.shape, 1), np.int32),  # type: ignore[arg-type]
      num_pages=np.ones(pieces.shape, np.int32),  # type: ignore[arg-type]
      first=np.zeros(pieces.shape, np.int32),  # type: ignore[arg-type]
    )
    tables = (table,) * len(windows_of(lm.config))
    number = np.array([count], np.int32)
    split = Pieces(pieces, number, tables)  # type: ignore[arg-type]
    chunk = Chunk(padded, positions, np.full_like(positions, -1), split)
    _, cache, usage = run(
      spec, lm.params, cache, (), None, (), chunk, (zero, zero), Sizes(1, width), usage=usage
    )
  length: Any = np.array(len(tokens), np.int32)  # a NumPy array is the same in all processes
  return Prefix(tuple(layer for (layer,) in cache), length), usage
