"""The caches of slots and shared prefixes: size, dtype, layout and allocation."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cai_jax.model.cache import Cache, LayerCache, Lengths, cache_lengths, init_cache
from cai_jax.model.config import ModelConfig
from cai_jax.model.lm import LM
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import BATCH, check_batch

# On TPUs a step writes one token's keys for all heads, so the memory layout is that of [B,S,K,H].
# With any other input or output layout, every call would copy the whole cache twice.
TPU_LAYOUT: Any = LayerCache(Layout((0, 3, 1, 2)), Layout((0, 2, 1, 3)))  # type: ignore[arg-type]


def cache_bytes(lm: LM, length: int, slack: int) -> int:
  """Return the size of one slot's cache in bytes, summed over devices.

  Args:
    lm: the model.
    length: number of tokens of the cache.
    slack: number of tokens that windowed layers keep beyond their window.
  """
  tokens = sum(map(sum, cache_lengths(lm.config, length, slack)))
  return tokens * 2 * lm.config.num_kv_heads * lm.config.head_dim * cache_dtype(lm).itemsize


def cache_dtype(lm: LM) -> jnp.dtype:
  """Return the cache's dtype: the compute dtype, or f32 on CPUs.

  On CPUs, XLA rewrites a half-precision cache in every step.
  """
  return jnp.dtype('float32' if on_cpu(lm.mesh) else lm.dtype)


def on_cpu(mesh: Mesh) -> bool:
  """Return whether a mesh consists of CPU devices."""
  return mesh.devices.flat[0].platform == 'cpu'


def cache_format(mesh: Mesh, spec: P) -> LayerCache:
  """Return the sharding of a layer's keys and values and, on TPUs, their layout.

  Args:
    mesh: the model's mesh.
    spec: how the heads and slots of the cache are split.
  """
  sharding: Any = NamedSharding(mesh, spec)
  if mesh.devices.flat[0].platform != 'tpu':
    return LayerCache(sharding, sharding)
  return LayerCache(*(Format(layout, sharding) for layout in TPU_LAYOUT))  # type: ignore[arg-type]


def allocate(lm: LM, slots: int, lengths: Lengths) -> Cache:
  """Allocate an empty cache on the model's mesh.

  Slots are split over the mesh's batch axes, and heads over `tensor`.

  Args:
    lm: the model.
    slots: B, number of slots.
    lengths: number of tokens of each span of each layer.

  Raises:
    UserError: if the mesh does not divide the number of slots or of key-value heads.
  """
  check_rows(lm, slots)
  return _allocate(lm, slots, lengths, P(*BATCH, 'tensor'))


def allocate_prefix(lm: LM, capacity: int) -> Cache:
  """Allocate an empty cache for one shared prefix, replicated over batch shards.

  Args:
    lm: the model.
    capacity: number of tokens that the cache can hold.

  Raises:
    UserError: if the mesh does not divide the number of key-value heads.
  """
  return _allocate(lm, 1, ((capacity,),) * lm.config.num_layers, P(None, 'tensor'))


def check_rows(lm: LM, rows: int) -> None:
  """Check that the model's mesh divides the rows of a cache and the key-value heads.

  Args:
    lm: the model.
    rows: number of rows.

  Raises:
    UserError: if it does not divide one of them.
  """
  check_batch(rows, lm.mesh, 'engine.slots')
  _check_heads(lm)


def _check_heads(lm: LM) -> None:
  kv_heads, tensor = lm.config.num_kv_heads, lm.mesh.shape['tensor']
  if kv_heads % tensor:
    raise UserError(
      f'mesh.tensor={tensor} does not divide the {kv_heads} key-value heads of {lm.name}. Set it '
      f'to a divisor of {kv_heads}.'
    )


def _allocate(lm: LM, rows: int, lengths: Lengths, spec: P) -> Cache:
  _check_heads(lm)
  program = _allocate_program(
    lm.config, rows, lengths, cache_dtype(lm), cache_format(lm.mesh, spec)
  )
  return program()


@functools.cache
def _allocate_program(
  config: ModelConfig, rows: int, lengths: Lengths, dtype: jnp.dtype, layout: LayerCache
) -> Callable:
  init = functools.partial(init_cache, config, rows, lengths, dtype)
  return jax.jit(init, out_shardings=tuple((layout,) * len(layer) for layer in lengths))
