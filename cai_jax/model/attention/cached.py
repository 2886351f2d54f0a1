"""Attention over keys that are stored in several blocks, such as the spans of a cache.

`cai_jax.model.transformer` defines the axis letters. R counts the queries that share a kv head.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cai_jax.model.attention.mask import MASKED
from cai_jax.model.cache import LayerCache, Packing
from cai_jax.model.precision import einsum_f32


class KeyBlock(NamedTuple):
  """A block of keys and values, and the mask of those that each query sees.

  Attributes:
    kv: k [B,K,H,S] and v [B,K,S,H]; B is 1 if all rows share the block.
    mask: bool[B,T,S].
    packing: the assignment of queries to rows of `kv`, if the queries are pieces of packed rows.
    live: bool[], whether any query sees a key of the block. If not, the block is not read. None
      means that the block is always read.
  """

  kv: LayerCache
  mask: jax.Array
  packing: Packing | None = None
  live: jax.Array | None = None


class PartialSoftmax(NamedTuple):
  """A softmax over one block of keys, before division by its sum.

  Attributes:
    max: f32[B,K,R,1], the largest score.
    sum: f32[B,K,R,1], the sum of exp(score - max).
    out: f32[B,K,R,H], the sum of the values weighted by exp(score - max).
  """

  max: jax.Array
  sum: jax.Array
  out: jax.Array


def attend(q: jax.Array, blocks: Sequence[KeyBlock]) -> jax.Array:
  """Return the attention output of one softmax over the keys of all blocks.

  The function computes a softmax per block and merges the results by their maxima and sums. A key
  that a query does not see adds an exact zero, so reading a block that only other queries need does
  not change a single bit.

  Args:
    q: [B,T,N,H], rotated.
    blocks: one or more blocks of keys and values.

  Returns:
    [B,T,N,H] in the dtype of `q`.
  """
  b, t, n, h = q.shape
  kv_heads = blocks[0].kv.v.shape[1]
  # The queries that share a kv head become the rows R of one matrix. XLA turns that into a plain
  # batch of matrix products, which decodes five to nine times as fast on a CPU as with separate
  # axes T and G. In bf16, CPUs do not support the latter at all.
  rows = q.reshape(b, t, kv_heads, -1, h).swapaxes(1, 2).swapaxes(2, 3)
  rows = rows.reshape(b, kv_heads, -1, h)

  def multiply(x, keys):
    """Multiply x [B,K,R,A] with keys [B,K,A,C]; keys with B = 1 are read once for all rows."""
    x = x.astype(keys.dtype)
    if keys.shape[0] == b:
      return einsum_f32('BKRA,BKAC->BKRC', x, keys)
    x = x.swapaxes(0, 1).reshape(kv_heads, -1, x.shape[-1])
    y = einsum_f32('KRA,KAC->KRC', x, keys[0])
    return y.reshape(kv_heads, b, -1, keys.shape[-1]).swapaxes(0, 1)

  def read(block):
    k, v = block.kv if block.packing is None else block.packing.read_rows(block.kv)
    scores = multiply(rows, k).reshape(b, kv_heads, -1, t, k.shape[-1])
    scores = jnp.where(block.mask[:, None, None], scores * h**-0.5, MASKED)
    scores = scores.reshape(b, kv_heads, -1, k.shape[-1])
    largest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - largest)
    return PartialSoftmax(largest, weights.sum(-1, keepdims=True), multiply(weights, v))

  def skip():
    masked = jnp.full((*rows.shape[:3], 1), MASKED, jnp.float32)
    return PartialSoftmax(masked, jnp.zeros_like(masked), jnp.zeros(rows.shape, jnp.float32))

  def read_if_live(block):
    if block.live is None:
      return read(block)
    return jax.lax.cond(block.live, lambda: read(block), skip)

  partials = [read_if_live(block) for block in blocks]
  if len(partials) == 1:
    total, out = partials[0].sum, partials[0].out
  else:
    largest = functools.reduce(jnp.maximum, [p.max for p in partials])
    scales = [jnp.exp(p.max - largest) for p in partials]
    total = sum(p.sum * scale for p, scale in zip(partials, scales, strict=True))
    out = sum(p.out * scale for p, scale in zip(partials, scales, strict=True))
  out = (out / total).reshape(b, kv_heads, -1, t, h).swapaxes(2, 3).swapaxes(1, 2)
  return out.reshape(b, t, n, h).astype(q.dtype)
