"""Blockwise attention that XLA compiles for every device, with O(T) memory for the backward pass.

The forward pass takes one block of queries at a time, with only the keys that the block can see. It
never holds all T × T scores, and skips most of those above the diagonal. The backward pass
recomputes the scores from the log-sum-exp of each query (Dao et al. 2022, section 3.1, without
tiles of keys).

`cai_jax.model.transformer` defines the axis letters. R counts the queries that share a kv head.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from cai_jax.model.attention.kernels.kernel import KERNELS, Kernel
from cai_jax.model.attention.mask import MASKED
from cai_jax.model.precision import einsum_f32

MIN_BLOCK = 128  # queries
MAX_BLOCKS = 8  # per row; XLA compiles each block separately


def attend_blockwise(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segment_ids: jax.Array,
  window: int | None,
  mesh: Mesh | AbstractMesh | None = None,
) -> jax.Array:
  """Attend within segments, one block of queries at a time; see `kernel.Attend`."""
  del mesh  # XLA splits rows and heads as those of q, k and v
  b, t, n, h = q.shape
  kv_heads = k.shape[2]
  grouped = q.reshape(b, t, kv_heads, n // kv_heads, h).transpose(0, 2, 3, 1, 4)
  k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
  out = _attend(window, grouped, k, v, segment_ids)
  return out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def split_blocks(length: int, window: int | None) -> list[tuple[slice, slice]]:
  """Split a row into blocks of queries.

  Args:
    length: number of tokens of the row.
    window: number of tokens that a query sees, itself included; None means no limit.

  Returns:
    For each block, the slice of its queries and the slice of all keys that any of them may see.
  """
  blocks = []
  size = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
  for start in range(0, length, size):
    end = min(start + size, length)
    first_key = 0 if window is None else max(0, start - window + 1)
    blocks.append((slice(start, end), slice(first_key, end)))
  return blocks


def _mask(queries: slice, keys: slice, window: int | None, segment_ids: jax.Array) -> jax.Array:
  """Return bool[B,1,1,T,S]: which keys of a block each of its queries sees."""
  distance = jnp.arange(queries.start, queries.stop)[:, None]
  distance = distance - jnp.arange(keys.start, keys.stop)[None]
  visible = distance >= 0
  if window is not None:
    visible &= distance < window
  same_segment = segment_ids[:, queries, None] == segment_ids[:, None, keys]
  return (visible & same_segment)[:, None, None]


def _scores(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
  """Return the scores f32[B,K,G,T,S] of q [B,K,G,T,H] and k [B,K,S,H]."""
  b, kv_heads, groups, t, h = q.shape
  x = einsum_f32('BKRH,BKSH->BKRS', q.reshape(b, kv_heads, -1, h), k)
  x = x.reshape(b, kv_heads, groups, t, -1) * h**-0.5
  return jnp.where(mask, x, MASKED)


def _merge_groups(x: jax.Array) -> jax.Array:
  """Reshape x [B,K,G,T,...] to [B,K,R,...] with R = G · T."""
  return x.reshape(*x.shape[:2], -1, *x.shape[4:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(window, q, k, v, segment_ids):
  """Return the output [B,K,G,T,H] for q [B,K,G,T,H] and k, v [B,K,T,H]."""
  return _attend_fwd(window, q, k, v, segment_ids)[0]


def _attend_fwd(window, q, k, v, segment_ids):
  outs, log_sums = [], []
  for queries, keys in split_blocks(q.shape[3], window):
    block = q[:, :, :, queries]
    x = _scores(block, k[:, :, keys], _mask(queries, keys, window, segment_ids))
    largest = x.max(-1, keepdims=True)
    x = jnp.exp(x - largest)
    total = x.sum(-1, keepdims=True)
    out = einsum_f32('BKRS,BKSH->BKRH', _merge_groups(x).astype(v.dtype), v[:, :, keys])
    outs.append((out.reshape(block.shape) / total).astype(q.dtype))
    log_sums.append(largest + jnp.log(total))
  out, log_sum = jnp.concatenate(outs, 3), jnp.concatenate(log_sums, 3)
  return out, (q, k, v, segment_ids, out, log_sum)


def _attend_bwd(window, residuals, g):
  q, k, v, segment_ids, out, log_sum = residuals
  scale = q.shape[-1] ** -0.5
  # The sum over keys of weight · d(weight), which the gradient of the softmax subtracts.
  mean = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)
  dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
  for queries, keys in split_blocks(q.shape[3], window):
    block, cotangent = q[:, :, :, queries], _merge_groups(g[:, :, :, queries])
    x = _scores(block, k[:, :, keys], _mask(queries, keys, window, segment_ids))
    weights = jnp.exp(x - log_sum[:, :, :, queries])
    by_value = einsum_f32('BKRS,BKRH->BKSH', _merge_groups(weights).astype(v.dtype), cotangent)
    dv = dv.at[:, :, keys].add(by_value)
    error = einsum_f32('BKRH,BKSH->BKRS', cotangent, v[:, :, keys]).reshape(weights.shape)
    error = _merge_groups(weights * (error - mean[:, :, :, queries]) * scale).astype(q.dtype)
    dq.append(einsum_f32('BKRS,BKSH->BKRH', error, k[:, :, keys]).reshape(block.shape))
    dk = dk.at[:, :, keys].add(einsum_f32('BKRS,BKRH->BKSH', error, _merge_groups(block)))
  dq = jnp.concatenate(dq, 3).astype(q.dtype)
  return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_fwd, _attend_bwd)

KERNELS.register('blocks')(Kernel(attend_blockwise))
