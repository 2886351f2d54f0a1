"""Blockwise attention that XLA compiles for every device, with memory that is linear in T.

Rows are split into tiles. The forward pass loops over pairs of a tile of queries and a tile of keys
and keeps a running softmax of each query (Dao et al. 2022, algorithm 1); the backward pass loops
over the same pairs and recomputes the scores from the log-sum-exp of each query (algorithm 4). One
step of a loop holds the scores of one pair, and no array has two axes of T.

Pairs above the diagonal or outside the window are left out when the program is compiled. Pairs
whose tiles have no segment in common are left out when it runs: packed rows have many. A segment
that shares tokens of an earlier one also needs the pairs with these.

`cai_jax.model.transformer` defines the axis letters. R counts the queries that share a kv head, and
P the pairs of tiles.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from cai_jax.model.attention.kernels.kernel import KERNELS, Kernel
from cai_jax.model.attention.mask import MASKED, SharedTokens, segments_mask
from cai_jax.model.attention.scores import PLAIN, Scores
from cai_jax.model.precision import einsum_f32

MIN_TILE = 128  # tokens
MAX_TILE = 512  # tokens; bounds the scores of a pair
TILES = 8  # per row, where tiles of this size are within the bounds


def attend_blockwise(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segment_ids: jax.Array,
  window: int | None,
  mesh: Mesh | AbstractMesh | None = None,
  scores: Scores = PLAIN,
  sinks: jax.Array | None = None,
  shared: SharedTokens | None = None,
) -> jax.Array:
  """Attend within segments, one pair of tiles at a time; see `kernel.Attend`."""
  del mesh  # XLA splits rows and heads as those of q, k and v
  b, t, n, h = q.shape
  kv_heads = k.shape[2]
  size = choose_tile(t)

  def split(x):
    """Return x [B,T,...] as tiles [I,B,size,...]; the padding has segment 0."""
    x = jnp.pad(x, ((0, 0), (0, -t % size), *((0, 0),) * (x.ndim - 2)))
    return x.reshape(b, -1, size, *x.shape[2:]).swapaxes(0, 1)

  # Queries of the same kv head are next to each other: [I,B,K,G,size,H].
  tiles = split(q).reshape(-1, b, size, kv_heads, n // kv_heads, h).transpose(0, 1, 3, 4, 2, 5)
  k, v = split(k).swapaxes(2, 3), split(v).swapaxes(2, 3)
  if sinks is not None:
    sinks = sinks.reshape(kv_heads, -1)
  if shared is not None:
    shared = SharedTokens(*map(split, shared))
  out = _attend(window, scores, tiles, k, v, split(segment_ids), sinks, shared)
  return out.transpose(1, 0, 4, 2, 3, 5).reshape(b, -1, n, h)[:, :t]


def choose_tile(length: int) -> int:
  """Return the number of tokens of a tile, for rows of `length` tokens."""
  size = min(max(-(-length // TILES), MIN_TILE), MAX_TILE)
  tiles = -(-length // size)
  return -(-length // tiles)  # tiles of equal size need the least padding


def tile_pairs(tiles: int, size: int, window: int | None) -> np.ndarray:
  """Return the pairs of tiles in which a query sees a key, i32[P,2]: (tile of queries, of keys).

  Args:
    tiles: number of tiles of a row.
    size: number of tokens of a tile.
    window: number of tokens that a query sees, itself included; None means no limit.
  """
  reach = tiles if window is None else -(-(window - 1) // size)  # tiles before the query's own
  return np.array([(i, j) for i in range(tiles) for j in range(max(0, i - reach), i + 1)], np.int32)


def needed_pairs(
  pairs: np.ndarray, segment_ids: jax.Array, last: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """Put the pairs in front in which a segment of the queries may see keys.

  The test compares the ranges of the ids in both tiles, so it can keep a pair that is not needed.

  Args:
    pairs: i32[P,2], from `tile_pairs`.
    segment_ids: i32[I,B,size].
    last: i32[I,B,size], last segment that sees each token; None means that only its own does.

  Returns:
    The pairs, i32[P,2], and how many of them are needed, i32[].
  """
  # Padding has the id 0 and is behind the other segments. As the largest id it keeps ranges small.
  ids = jnp.where(segment_ids == 0, jnp.iinfo(segment_ids.dtype).max, segment_ids)
  low, high = ids.min(-1), ids.max(-1)
  seen = high if last is None else jnp.where(segment_ids == 0, ids, last).max(-1)
  queries, keys = pairs[:, 0], pairs[:, 1]
  needed = ((low[queries] <= seen[keys]) & (low[keys] <= high[queries])).any(1)
  return jnp.asarray(pairs)[jnp.argsort(~needed, stable=True)], needed.sum()


def _take(x: jax.Array, i: jax.Array) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)


def _put(x: jax.Array, i: jax.Array, value: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(x, value, i, 0)


def _mask(window, segment_ids, shared, i, j) -> jax.Array:
  """Return the mask bool[B,T,S] of the queries of tile i with the keys of tile j."""
  size = segment_ids.shape[-1]
  distance = (i - j) * size + jnp.arange(size)[:, None] - jnp.arange(size)[None]
  visible = distance >= 0
  last: jax.Array | None = None
  if shared is not None:
    last, positions = _take(shared.last, j), shared.positions
    distance = _take(positions, i)[:, :, None] - _take(positions, j)[:, None]
  if window is not None:
    visible = visible & (distance < window)
  return visible & segments_mask(_take(segment_ids, i), _take(segment_ids, j), last)


def _scores(window, scores, q, k, segment_ids, shared, i, j) -> jax.Array:
  """Return the scores f32[B,K,R,S] of the queries of tile i with the keys of tile j."""
  mask = _mask(window, segment_ids, shared, i, j)
  q, k = _take(q, i), _take(k, j)
  b, kv_heads, groups, size, h = q.shape
  x = einsum_f32('BKRH,BKSH->BKRS', _merge_groups(q), k)
  x = scores.of_products(x.reshape(b, kv_heads, groups, size, size), h)
  return _merge_groups(jnp.where(mask[:, None, None], x, MASKED))


def _merge_groups(x: jax.Array) -> jax.Array:
  """Reshape x [B,K,G,T,...] to [B,K,R,...] with R = G · T."""
  return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _sum_queries(x: jax.Array, y: jax.Array, groups: int) -> jax.Array:
  """Return Σ_R x[B,K,R,S] · y[B,K,R,H], f32[B,K,S,H].

  The sum has two axes, G and T, because XLA for CPUs has a fast product for such a sum. It computes
  one over R more slowly, and bf16 not at all.
  """
  x, y = (z.reshape(*z.shape[:2], groups, -1, z.shape[-1]) for z in (x, y))
  return einsum_f32('BKGTS,BKGTH->BKSH', x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(window, scores, q, k, v, segment_ids, sinks, shared):
  """Return the output [I,B,K,G,T,H] of attention.

  Args:
    window, scores: as for `kernel.Attend`.
    q: tiles [I,B,K,G,T,H].
    k, v: tiles [I,B,K,T,H].
    segment_ids: i32[I,B,T].
    sinks: f32[K,G], or None.
    shared: arrays i32[I,B,T], or None.
  """
  return _attend_fwd(window, scores, q, k, v, segment_ids, sinks, shared)[0]


def _pairs(window, segment_ids, shared):
  """Return the pairs of tiles, and how many of them are needed."""
  tiles, _, size = segment_ids.shape
  if shared is None:
    return needed_pairs(tile_pairs(tiles, size, window), segment_ids)
  # A key within the window may stand farther away in the row.
  return needed_pairs(tile_pairs(tiles, size, None), segment_ids, shared.last)


def _attend_fwd(window, scores, q, k, v, segment_ids, sinks, shared):
  tiles, b, kv_heads, groups, size, h = q.shape
  pairs, count = _pairs(window, segment_ids, shared)

  def add_pair(n, carry):
    out, largest, total = carry
    i, j = pairs[n, 0], pairs[n, 1]
    x = _scores(window, scores, q, k, segment_ids, shared, i, j)
    before = _take(largest, i)
    now = jnp.maximum(before, x.max(-1, keepdims=True))
    weights, rescale = jnp.exp(x - now), jnp.exp(before - now)
    value = einsum_f32('BKRS,BKSH->BKRH', weights.astype(v.dtype), _take(v, j))
    out = _put(out, i, _take(out, i) * rescale + value)
    total = _put(total, i, _take(total, i) * rescale + weights.sum(-1, keepdims=True))
    return out, _put(largest, i, now), total

  queries = (tiles, b, kv_heads, groups * size)
  initial = (
    jnp.zeros((*queries, h), jnp.float32),
    jnp.full((*queries, 1), MASKED, jnp.float32),
    jnp.zeros((*queries, 1), jnp.float32),
  )
  if sinks is not None:  # a score without a value, before those of the keys
    out, _, total = initial
    initial = out, _for_queries(sinks, out), jnp.ones_like(total)
  out, largest, total = jax.lax.fori_loop(0, count, add_pair, initial)
  out = (out / total).astype(q.dtype)
  log_sum = largest + jnp.log(total)
  return out.reshape(q.shape), (q, k, v, segment_ids, sinks, shared, out, log_sum)


def _attend_bwd(window, scores, residuals, g):
  q, k, v, segment_ids, sinks, shared, out, log_sum = residuals
  _, _, _, groups, size, h = q.shape
  pairs, count = _pairs(window, segment_ids, shared)
  # The sum over keys of weight · d(weight), which the gradient of the softmax subtracts.
  g, wide = g.reshape(out.shape), jnp.float32
  mean = einsum_f32('IBKRH,IBKRH->IBKR', g.astype(wide), out.astype(wide))[..., None]

  def add_pair(n, carry):
    dq, dk, dv = carry
    i, j = pairs[n, 0], pairs[n, 1]
    x = _scores(window, scores, q, k, segment_ids, shared, i, j)
    weights = jnp.exp(x - _take(log_sum, i))
    cotangent = _take(g, i)
    dv_part = _sum_queries(weights.astype(v.dtype), cotangent, groups)
    error = einsum_f32('BKRH,BKSH->BKRS', cotangent, _take(v, j))
    error = scores.pull_back(x, weights * (error - _take(mean, i)), h).astype(q.dtype)
    dq_part = einsum_f32('BKRS,BKSH->BKRH', error, _take(k, j))
    dk_part = _sum_queries(error, _merge_groups(_take(q, i)), groups)
    dq, dk = _put(dq, i, _take(dq, i) + dq_part), _put(dk, j, _take(dk, j) + dk_part)
    return dq, dk, _put(dv, j, _take(dv, j) + dv_part)

  initial = tuple(jnp.zeros(x.shape, jnp.float32) for x in (out, k, v))
  dq, dk, dv = jax.lax.fori_loop(0, count, add_pair, initial)
  sinks_gradient = None
  if sinks is not None:
    by_query = jnp.exp(_for_queries(sinks, out) - log_sum) * -mean
    by_query = by_query.reshape(*out.shape[:3], groups, size)
    sinks_gradient = by_query.sum((0, 1, 4))
  dq = dq.astype(q.dtype).reshape(q.shape)
  return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, sinks_gradient, None


def _for_queries(sinks, out):
  """Return sinks f32[K,G] as f32[I,B,K,R,1], for the queries of `out` [I,B,K,R,H]."""
  repeated = jnp.repeat(sinks, out.shape[3] // sinks.shape[1], axis=1)
  return jnp.broadcast_to(repeated[..., None], (*out.shape[:4], 1))


_attend.defvjp(_attend_fwd, _attend_bwd)

KERNELS.register('blocks')(Kernel(attend_blockwise, sinks=True, shares=True))
