"""A softmax over keys in several places: computed in parts, which are then merged.

`cai_jax.model.transformer` defines the axis letters. R counts the queries that share a kv head.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cai_jax.model.attention.mask import MASKED
from cai_jax.model.attention.scores import Scores
from cai_jax.model.precision import einsum_f32, sum_entries

SCORES_AT_ONCE = 2**27  # that a device holds of long keys at a time: 512 MB in f32


class PartialSoftmax(NamedTuple):
  """A softmax over some of the keys, before division by its sum.

  Attributes:
    max: f32[...,1], the largest score.
    sum: f32[...,1], the sum of exp(score - max).
    out: f32[...,H], the sum of the values weighted by exp(score - max).
  """

  max: jax.Array
  sum: jax.Array
  out: jax.Array

  @classmethod
  def empty(cls, shape: tuple[int, ...], head_dim: int) -> 'PartialSoftmax':
    """Return the softmax over no key, for queries of a shape."""
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    return cls(
      jnp.full((*shape, 1), MASKED, jnp.float32), zeros((*shape, 1)), zeros((*shape, head_dim))
    )

  def with_sinks(self, sinks: jax.Array) -> 'PartialSoftmax':
    """Return the softmax with a further score for each head, which has no value.

    Args:
      sinks: f32[N], the scores; the arrays of this softmax are [...,N,1] and [...,N,H].
    """
    sinks = sinks[:, None]
    largest = jax.lax.stop_gradient(jnp.maximum(self.max, sinks))
    scale = jnp.exp(self.max - largest)
    return PartialSoftmax(largest, self.sum * scale + jnp.exp(sinks - largest), self.out * scale)

  def divided(self) -> jax.Array:
    """Return the output f32[...,H] of the whole softmax; 0 for a query without keys."""
    return self.out / jnp.where(self.sum > 0, self.sum, 1.0)


def merge(parts: Sequence[PartialSoftmax]) -> PartialSoftmax:
  """Return the softmax over the keys of all parts.

  A part without visible keys adds an exact zero, so it does not change a single bit.

  Args:
    parts: one or more, of the same queries.
  """
  if len(parts) == 1:
    return parts[0]
  largest = functools.reduce(jnp.maximum, [part.max for part in parts])
  scales = [jnp.exp(part.max - largest) for part in parts]
  scaled = [(part.sum * scale, part.out * scale) for part, scale in zip(parts, scales, strict=True)]
  total, out = (functools.reduce(jnp.add, terms) for terms in zip(*scaled, strict=True))
  return PartialSoftmax(largest, total, out)


def read_keys(
  queries: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scores: Scores
) -> PartialSoftmax:
  """Return the softmax over keys; leading axes `...` are batch axes.

  The queries that share a kv head are the rows R of one matrix: T queries for each of several
  heads, with T the faster axis. XLA turns that into a plain batch of matrix products, which is five
  to nine times as fast on a CPU as with separate axes. In bf16, CPUs do not support the latter.

  Args:
    queries: [...,K,R,H], rotated.
    k: [...,K,H,S].
    v: [...,K,S,H].
    mask: bool[...,T,S], the keys that each query sees.
    scores: scale and cap of the scores.
  """
  products = einsum_f32('...RA,...AC->...RC', queries.astype(k.dtype), k)
  weights, largest = _weigh(scores.of_products(products, queries.shape[-1]), mask)
  out = einsum_f32('...RA,...AC->...RC', weights.astype(v.dtype), v)
  return PartialSoftmax(largest, weights.sum(-1, keepdims=True), out)


def read_long_keys(
  queries: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scores: Scores
) -> PartialSoftmax:
  """Return `read_keys` with at most about `SCORES_AT_ONCE` scores in memory.

  Where there are more, it reads blocks of keys one after the other, with a running softmax (Milakov
  and Gimelshein 2018; Rabe and Staats 2021). With fewer, it is `read_keys` to the bit. Arguments
  are those of `read_keys`.
  """
  length = k.shape[-1]
  blocks = -(-math.prod(queries.shape[:-1]) * length // SCORES_AT_ONCE)
  if blocks <= 1:
    return read_keys(queries, k, v, mask, scores)
  while length % blocks:  # blocks of equal size
    blocks += 1
  size = length // blocks

  def add_block(number, part):
    take = functools.partial(
      jax.lax.dynamic_slice_in_dim, start_index=number * size, slice_size=size
    )
    block = take(k, axis=-1), take(v, axis=-2), take(mask, axis=-1)
    return merge([part, read_keys(queries, *block, scores)])

  empty = PartialSoftmax.empty(queries.shape[:-1], v.shape[-1])
  return jax.lax.fori_loop(0, blocks, add_block, empty)


def read_pages(
  queries: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scores: Scores
) -> PartialSoftmax:
  """Return `read_keys` of small pages, as products and sums that CPUs compute in place.

  Per page there are too few queries for a matrix product to pay off: at three queries for each kv
  head, XLA's product takes 1.4 times as long on two cores. Arguments are those of `read_keys`.
  """
  products = (queries[..., :, None] * k[..., None, :, :]).sum(-2)
  weights, largest = _weigh(scores.of_products(products, queries.shape[-1]), mask)
  out = (weights[..., :, None] * v[..., None, :, :]).sum(-2)
  return PartialSoftmax(largest, sum_entries(weights)[..., None], out)


def _weigh(scores: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Return exp(score - max) [...,K,R,S] of masked scores, and the maxima [...,K,R,1]."""
  shape = scores.shape
  scores = scores.reshape(*shape[:-2], -1, *mask.shape[-2:])
  scores = jnp.where(mask[..., None, None, :, :], scores, MASKED).reshape(shape)
  largest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
  return jnp.exp(scores - largest), largest


def group_queries(q: jax.Array, kv_heads: int) -> jax.Array:
  """Return q [...,T,N,H] as the rows [...,K,R,H] of `read_keys`."""
  *batch, t, n, h = q.shape
  q = jnp.moveaxis(q.reshape(*batch, t, kv_heads, n // kv_heads, h), -4, -2)
  return q.reshape(*batch, kv_heads, -1, h)


def ungroup_queries(x: jax.Array, length: int) -> jax.Array:
  """Return rows x [...,K,R,A] as [...,T,N,A] for T = `length`; the inverse of `group_queries`."""
  *batch, kv_heads, rows, a = x.shape
  x = jnp.moveaxis(x.reshape(*batch, kv_heads, rows // length, length, a), -2, -4)
  return x.reshape(*batch, length, -1, a)


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: jax.Array,
  scores: Scores,
  sinks: jax.Array | None = None,
) -> jax.Array:
  """Return the attention output of rows that hold their own keys.

  Args:
    q: [B,T,N,H], rotated.
    k: [B,S,K,H], rotated.
    v: [B,S,K,H].
    mask: bool[B,T,S].
    scores: scale and cap of the scores.
    sinks: f32[N], a further score of each head, or None.

  Returns:
    [B,T,N,H] in the dtype of `q`.
  """
  queries = group_queries(q, k.shape[2])
  part = read_keys(queries, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), mask, scores)
  if sinks is None:
    return ungroup_queries(part.divided(), q.shape[1]).astype(q.dtype)
  part = PartialSoftmax(*(ungroup_queries(x, q.shape[1]) for x in part))
  return part.with_sinks(sinks).divided().astype(q.dtype)
