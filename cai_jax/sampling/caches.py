"""The caches of slots and shared prefixes: size, dtype, layout and allocation."""

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cai_jax.model.attention.cached import CACHED
from cai_jax.model.cache import init_states, windows_of
from cai_jax.model.config import DeltaRule, LayerKind, ModelConfig
from cai_jax.model.delta_cache import state_specs
from cai_jax.model.lm import LM
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import BATCH, check_batch

Block = tuple[Any, ...]  # for each layer with the same window, its pages
STATES = 'states'  # layers with a state, in place of the name of an attention to the cache


def pages_of(length: int, window: int | None, slack: int, page_tokens: int) -> int:
  """Return the largest number of pages that a row has in a layer.

  Args:
    length: number of tokens of the row.
    window: the layer's window; None means no limit, and 0 a layer with a state.
    slack: number of tokens beyond its window for which a windowed layer has room.
    page_tokens: number of tokens of a page.
  """
  if window == 0:
    return 1
  if window is not None:
    length = min(
      length, window + slack + page_tokens
    )  # the first page may be almost out of the window
  return -(-length // page_tokens)


def cache_bytes(lm: LM, length: int, slack: int, page_tokens: int = 1) -> int:
  """Return the largest size of one slot's cache in bytes, summed over devices.

  Args:
    lm: the model.
    length: number of tokens of the cache.
    slack: number of tokens beyond its window for which a windowed layer has room.
    page_tokens: number of tokens of a page.
  """
  sizes = slack, page_tokens
  dtype = cache_dtype(lm)
  numbers = sum(pages_of(length, kind.window, *sizes) * kind.cached for kind in lm.config.kinds)
  states = sum(layer_state_bytes(kind.delta, dtype) for kind in lm.config.kinds if kind.delta)
  return numbers * page_tokens * dtype.itemsize + states


def layer_state_bytes(delta: DeltaRule, dtype: jnp.dtype) -> int:
  """Return the size of one slot's state in one layer, in bytes.

  Args:
    delta: sizes of the layer.
    dtype: the cache's dtype.
  """
  states = jax.eval_shape(lambda: init_states(delta, 1, dtype))
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(states))


def cache_dtype(lm: LM) -> jnp.dtype:
  """Return the cache's dtype: the compute dtype, or f32 on CPUs.

  On CPUs, XLA rewrites a half-precision cache in every step.
  """
  return jnp.dtype('float32' if on_cpu(lm.mesh) else lm.dtype)


def on_cpu(mesh: Mesh) -> bool:
  """Return whether a mesh consists of CPU devices."""
  return mesh.devices.flat[0].platform == 'cpu'


def cache_format(mesh: Mesh, attention: str, shared: bool) -> tuple[Any, ...]:
  """Return the sharding of the arrays of a layer's pages and, on TPUs, their layout.

  Args:
    mesh: the model's mesh.
    attention: name of the attention to the cache, or `STATES`.
    shared: whether all batch shards have the same pages; otherwise the pages are split over them.
  """
  if attention == STATES:
    specs = state_specs((None,) if shared else tuple(BATCH))
    return tuple(NamedSharding(mesh, spec) for spec in specs)
  entry = CACHED[attention]
  split = P(*((None,) if shared else BATCH), *(None,) * (entry.heads - 1), 'tensor')
  sharding = NamedSharding(mesh, split)
  if mesh.devices.flat[0].platform != 'tpu':
    return (sharding,) * len(entry.layouts)
  layouts = [None if order is None else Layout(order) for order in entry.layouts]
  return tuple(sharding if layout is None else Format(layout, sharding) for layout in layouts)


def allocate_block(
  lm: LM, window: int | None, pages: int, page_tokens: int, attention: str = 'pages'
) -> Block:
  """Allocate pages of zeros for all layers with one window.

  Pages are split over the mesh's batch axes, and heads over `tensor`.

  Args:
    lm: the model.
    window: the window of the layers.
    pages: number of pages over all batch shards.
    page_tokens: number of tokens of a page.
    attention: name of the attention to the cache.

  Raises:
    UserError: if the mesh does not divide the number of key-value heads.
  """
  assert window in windows_of(lm.config)
  kinds = [kind for kind in lm.config.kinds if kind.window == window]
  return _allocate(lm, kinds, pages, page_tokens, attention, False)


def allocate_prefix(lm: LM, capacity: int) -> Block:
  """Allocate an empty cache for one shared prefix, replicated over batch shards.

  It has one page, as the attention 'pages' stores it: all rows read it together.

  Args:
    lm: the model.
    capacity: number of tokens that the cache can hold.

  Raises:
    UserError: if the mesh does not divide the number of key-value heads.
  """
  return _allocate(lm, lm.config.kinds, 1, capacity, 'pages', True)


def check_rows(lm: LM, rows: int) -> None:
  """Check that the model's mesh divides the number of slots and of key-value heads.

  Args:
    lm: the model.
    rows: number of slots.

  Raises:
    UserError: if it does not divide one of them.
  """
  check_batch(rows, lm.mesh, 'engine.slots')
  check_heads(lm.config, lm.mesh, lm.name)


def check_heads(config: ModelConfig, mesh: Mesh, name: str) -> None:
  """Check that a mesh divides the number of a model's key-value heads.

  Args:
    config: the shape of the model.
    mesh: the mesh on which it samples.
    name: its name, for the error message.

  Raises:
    UserError: if it does not.
  """
  tensor = mesh.shape['tensor']
  for kv_heads in dict.fromkeys(kind.kv_heads for kind in config.kinds):
    if kv_heads % tensor:
      raise UserError(
        f'mesh.tensor={tensor} does not divide the {kv_heads} key-value heads of {name}, which '
        f'samples. Set it, or mesh_sampling.tensor, to a divisor of {kv_heads}.'
      )


def _allocate(
  lm: LM, kinds: Sequence[LayerKind], pages: int, size: int, attention: str, shared: bool
) -> Block:
  check_heads(lm.config, lm.mesh, lm.name)
  layers = tuple(kind.delta or (kind.kv_heads, kind.head_dim) for kind in kinds)
  names = [STATES if kind.delta else attention for kind in kinds]
  formats = tuple(x for name in names for x in cache_format(lm.mesh, name, shared))
  return _allocate_program(layers, pages, size, cache_dtype(lm), attention, formats)()


@functools.cache
def _allocate_program(
  layers: tuple[tuple[int, int] | DeltaRule, ...],
  pages: int,
  size: int,
  dtype: jnp.dtype,
  attention: str,
  formats: tuple[Any, ...],
) -> Callable:
  """Return the program that allocates layers with a delta rule, or with these heads and sizes."""

  def init_layer(layer):
    if isinstance(layer, DeltaRule):
      return init_states(layer, pages, dtype)
    return CACHED[attention].init(*layer, pages, size, dtype)

  init = lambda: tuple(map(init_layer, layers))  # noqa: E731
  structure = jax.tree.structure(jax.eval_shape(init))
  return jax.jit(init, out_shardings=jax.tree.unflatten(structure, formats))


def move_pages(target: Block, source: Block, moves: Sequence[tuple[int, int]]) -> Block:
  """Return a block with some pages replaced by those of another one.

  Args:
    target: the block, for all layers; donated.
    source: the other one.
    moves: indices of a page in `target` and of the page in `source` that replaces it.
  """
  pages = len(jax.tree.leaves(target)[0])
  padded = np.zeros((pages, 2), np.int32)
  padded[: len(moves)] = moves
  return tuple(
    _move_pages(mine, theirs, padded, np.array(len(moves), np.int32))
    for mine, theirs in zip(target, source, strict=True)
  )


@functools.partial(jax.jit, donate_argnums=0)
def _move_pages(target, source, moves, count):
  def move(number, target):
    to, origin = moves[number]

    def replace(x, y):
      page = jax.lax.dynamic_index_in_dim(y, origin)
      return jax.lax.dynamic_update_index_in_dim(x, page, to, 0)

    return jax.tree.map(replace, target, source)

  return jax.lax.fori_loop(0, count, move, target)


def trim_heap() -> None:
  """Return free heap memory to the operating system, if the C library can (glibc on Linux).

  On CPUs, compilation and the caches of deleted engines leave many small free blocks on the heap.
  Beside the cache about to be allocated they took half a gigabyte with a model of 0.5 GB.
  """
  library = ctypes.CDLL(None)
  if hasattr(library, 'malloc_trim'):
    library.malloc_trim(0)
