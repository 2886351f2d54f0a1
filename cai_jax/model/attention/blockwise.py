"""Attention of packed rows in plain XLA that keeps no scores for the backward pass.

Queries are taken a block at a time, each with the keys that lie before its end and in its window: a
square of scores is never whole, and the half above its diagonal mostly not computed. The backward
pass makes the scores again from each query's log-sum-exp (Dao et al. 2022, section 3.1, without its
tiles of keys). Axes: transformer.py; R is the queries that share a kv head.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cai_jax.model.attention.softmax import MASKED, product

BLOCK = 128  # queries at once, at least
MOST_BLOCKS = 8  # of a row: each is compiled by itself


def blockwise(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segment_ids: jax.Array,
  window: int | None,
  mesh: Mesh | None = None,
) -> jax.Array:
  """Output [B,T,N,H] of causal attention within segments.

  Args:
    q: [B,T,N,H], rotated.
    k, v: [B,T,K,H], k rotated.
    segment_ids: i32[B,T].
    window: tokens that a query sees, itself included; None is all before it.
    mesh: not needed; XLA splits rows and heads as q, k and v are.
  """
  del mesh
  b, t, n, h = q.shape
  heads = k.shape[2]
  grouped = q.reshape(b, t, heads, n // heads, h).transpose(0, 2, 3, 1, 4)
  k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
  out = _attend(window, grouped, k, v, segment_ids)
  return out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def _blocks(length: int, window: int | None) -> list[tuple[slice, slice]]:
  """(queries, keys that any of them may see), block by block."""
  found = []
  size = max(BLOCK, -(-length // MOST_BLOCKS))
  for start in range(0, length, size):
    end = min(start + size, length)
    first = 0 if window is None else max(0, start - window + 1)
    found.append((slice(start, end), slice(first, end)))
  return found


def _mask(queries: slice, keys: slice, window: int | None, segment_ids: jax.Array) -> jax.Array:
  """bool[B,1,1,T,S]: which keys of a block its queries see."""
  distance = jnp.arange(queries.start, queries.stop)[:, None]
  distance = distance - jnp.arange(keys.start, keys.stop)[None]
  seen = distance >= 0
  if window is not None:
    seen &= distance < window
  same = segment_ids[:, queries, None] == segment_ids[:, None, keys]
  return (seen & same)[:, None, None]


def _scores(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
  """f32[B,K,G,T,S] of q [B,K,G,T,H] and k [B,K,S,H]."""
  b, heads, groups, t, h = q.shape
  x = product('BKRH,BKSH->BKRS', q.reshape(b, heads, -1, h), k)
  x = x.reshape(b, heads, groups, t, -1) * h**-0.5
  return jnp.where(mask, x, MASKED)


def _join(x: jax.Array) -> jax.Array:
  """[B,K,R,...] of x [B,K,G,T,...]."""
  return x.reshape(*x.shape[:2], -1, *x.shape[4:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(window, q, k, v, segment_ids):
  """[B,K,G,T,H] of q [B,K,G,T,H] and k, v [B,K,T,H]."""
  return _attend_fwd(window, q, k, v, segment_ids)[0]


def _attend_fwd(window, q, k, v, segment_ids):
  outs, sums = [], []
  for queries, keys in _blocks(q.shape[3], window):
    block = q[:, :, :, queries]
    x = _scores(block, k[:, :, keys], _mask(queries, keys, window, segment_ids))
    top = x.max(-1, keepdims=True)
    x = jnp.exp(x - top)
    total = x.sum(-1, keepdims=True)
    out = product('BKRS,BKSH->BKRH', _join(x).astype(v.dtype), v[:, :, keys])
    outs.append((out.reshape(block.shape) / total).astype(q.dtype))
    sums.append(top + jnp.log(total))
  out, log_z = jnp.concatenate(outs, 3), jnp.concatenate(sums, 3)
  return out, (q, k, v, segment_ids, out, log_z)


def _attend_bwd(window, residuals, g):
  q, k, v, segment_ids, out, log_z = residuals
  scale = q.shape[-1] ** -0.5
  along = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)
  dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
  for queries, keys in _blocks(q.shape[3], window):
    block, cotangent = q[:, :, :, queries], _join(g[:, :, :, queries])
    x = _scores(block, k[:, :, keys], _mask(queries, keys, window, segment_ids))
    x = jnp.exp(x - log_z[:, :, :, queries])
    dv = dv.at[:, :, keys].add(product('BKRS,BKRH->BKSH', _join(x).astype(v.dtype), cotangent))
    error = product('BKRH,BKSH->BKRS', cotangent, v[:, :, keys]).reshape(x.shape)
    error = _join(x * (error - along[:, :, :, queries]) * scale).astype(q.dtype)
    dq.append(product('BKRS,BKSH->BKRH', error, k[:, :, keys]).reshape(block.shape))
    dk = dk.at[:, :, keys].add(product('BKRS,BKRH->BKSH', error, _join(block)))
  dq = jnp.concatenate(dq, 3).astype(q.dtype)
  return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_fwd, _attend_bwd)
