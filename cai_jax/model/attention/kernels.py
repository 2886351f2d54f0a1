"""Attention of packed rows that keeps no scores for the backward pass, by name.

'blocks' is plain XLA everywhere and stands in blockwise.py; 'splash' is JAX's Pallas kernel for
TPUs, 'cudnn' cuDNN's for NVIDIA GPUs. 'xla' is none of them but attention.py, whole squares of
scores and all. Each is exact up to rounding. Axes: transformer.py.
"""

import functools
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel,
  splash_attention_mask,
)
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cai_jax.model.attention.blockwise import blockwise
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import BATCH

TILE = 128  # tokens that splash attention takes at once are a multiple of it
BLOCK = 512  # of them, at most


class Kernel(Protocol):
  """Output [B,T,N,H] of causal attention within segments."""

  def __call__(
    self,
    q: jax.Array,  # [B,T,N,H], rotated
    k: jax.Array,  # [B,T,K,H], rotated
    v: jax.Array,  # [B,T,K,H]
    segment_ids: jax.Array,  # i32[B,T]
    window: int | None,  # tokens that a query sees, itself included; None is all before it
    mesh: Mesh | None,  # rows are split over its batch axes, heads over `tensor`
  ) -> jax.Array: ...


def splash(q, k, v, segment_ids, window, mesh, interpret=False) -> jax.Array:
  """`Kernel` by splash attention (JAX's Pallas kernels); `interpret` runs it on any device.

  Blocks that no query of a tile may see by position are skipped; segments are masked within.
  """
  length = q.shape[1]
  block = max(size for size in range(TILE, BLOCK + 1, TILE) if length % size == 0)
  sizes = splash_attention_kernel.BlockSizes(
    block_q=block,
    block_kv=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_q_dq=block,
    block_kv_dq=block,
  )
  if window is None:
    mask = splash_attention_mask.CausalMask((length, length))
  else:
    mask = splash_attention_mask.LocalMask((length, length), (window - 1, 0), 0)

  def local(q, k, v, segment_ids):
    heads = splash_attention_mask.MultiHeadMask([mask] * q.shape[2])
    kernel = splash_attention_kernel.make_splash_mha(
      heads, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )

    def row(q, k, v, ids):
      return kernel(q, k, v, segment_ids=splash_attention_kernel.SegmentIds(ids, ids))

    scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    heads_first = (x.swapaxes(1, 2) for x in (scaled, k, v))
    return jax.vmap(row)(*heads_first, segment_ids).swapaxes(1, 2)

  split = P(*BATCH, None, 'tensor', None)
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(split, split, split, BATCH),
    out_specs=split,
    check_vma=False,
  )(q, k, v, segment_ids)


def cudnn(q, k, v, segment_ids, window, mesh, implementation='cudnn') -> jax.Array:
  """`Kernel` by cuDNN's flash attention, through `jax.nn`; segments go in as a mask [B,1,T,T]."""
  same = segment_ids[:, :, None] == segment_ids[:, None, :]
  return jax.nn.dot_product_attention(
    q,
    k,
    v,
    mask=same[:, None],
    is_causal=True,
    local_window_size=None if window is None else (window - 1, 0),
    implementation=implementation,
  )


KERNELS: dict[str, Kernel | None] = {
  'xla': None,
  'blocks': blockwise,
  'splash': splash,
  'cudnn': cudnn,
}
PLATFORMS = {'splash': 'tpu', 'cudnn': 'gpu'}


def check(name: str, mesh: Mesh, dtype: str, length: int) -> None:
  """ValueError if such attention cannot run: on these devices, in this dtype, at this row length.

  Args:
    name: of KERNELS.
    mesh: of the devices.
    dtype: compute dtype.
    length: tokens of a row.
  """
  if name not in KERNELS:
    raise UserError(f'attention {name!r} is not one of {tuple(KERNELS)}.')
  platform = mesh.devices.flat[0].platform
  if PLATFORMS.get(name, platform) != platform:
    able = [n for n in KERNELS if PLATFORMS.get(n, platform) == platform]
    raise UserError(
      f'attention {name!r} runs on {PLATFORMS[name].upper()}s only, and these devices are '
      f'{platform.upper()}s: choose {" or ".join(map(repr, able))}.'
    )
  if name == 'splash' and length % TILE:
    raise UserError(f"attention 'splash' takes rows of a multiple of {TILE} tokens, not {length}.")
  if name == 'cudnn' and dtype == 'float32':
    raise UserError("attention 'cudnn' computes in bfloat16 or float16 only, not in float32.")


def bind(name: str, segment_ids: jax.Array | None, mesh: Mesh | None):
  """The kernel of that name, for rows with these segments: of q, k, v and window; None for 'xla'.

  Raises:
    ValueError: without segments or a mesh, which kernels need.
  """
  kernel = KERNELS[name]
  if kernel is None:
    return None
  if segment_ids is None or (mesh is None and name in PLATFORMS):
    raise UserError(f'attention {name!r} is for packed rows on a mesh: it needs segment_ids.')
  return functools.partial(kernel, segment_ids=segment_ids, mesh=mesh)
