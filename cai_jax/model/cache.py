"""The cache of keys and values: its shape, what lies where in it, and how tokens enter it.

Axes are those of transformer.py; of packed tokens: B groups, R pieces of a group, C tokens of a
piece.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cai_jax.model.config import ModelConfig

SPAN = 128  # tokens of a cache that are read or left out together, at least


class LayerCache(NamedTuple):
  """Keys and values of a span of one layer's tokens.

  Keys lie transposed: both products of a decode step then read memory in order.
  """

  k: jax.Array  # [B,K,H,S]
  v: jax.Array  # [B,K,S,H]


# The spans of each layer, written in place, never stacked. The i-th token that a row owns lies at
# index i, modulo the length of all spans together. Layers that attend to everything have room for
# all of a row's tokens, and do not read spans that no row has come to. Windowed layers are rings of
# one span.
Cache = tuple[tuple[LayerCache, ...], ...]
Lengths = tuple[tuple[int, ...], ...]  # tokens of each layer's spans


class Prefix(NamedTuple):
  """A sequence of tokens that many rows begin with: their caches hold what comes after it."""

  cache: Cache  # of one row, B = 1, and one span a layer
  length: jax.Array  # i32[], tokens; the rest of the cache is padding


class Prefixes(NamedTuple):
  """The prefixes at hand, and the one that each row begins with."""

  entries: tuple[Prefix, ...]
  of_row: jax.Array  # i32[B], or i32[B,T] of packed tokens: an index of `entries`; -1 is none

  def lengths(self) -> jax.Array:
    """i32, as `of_row`: the position of the first token that each row owns."""
    if not self.entries:
      return jnp.zeros_like(self.of_row)
    lengths = jnp.stack([prefix.length for prefix in self.entries])
    return jnp.where(self.of_row < 0, 0, lengths[self.of_row])


class Packing(NamedTuple):
  """Which rows of a cache T tokens continue, where those of several rows lie side by side.

  Products with parameters take the tokens as they are, with no padding between them. Attention
  takes them in R pieces, each of up to C tokens of one row. The B parts of the tokens belong to B
  equal parts of the cache's rows, so that a mesh that splits both has nothing to send.
  """

  rows: jax.Array  # i32[B,T], each token's row in its part of the cache
  index: jax.Array  # i32[B,R,C], which of the T tokens lie in a piece; T is none
  place: jax.Array  # i32[B,T], where each token lies in its part's R × C

  def pieces(self, x: jax.Array, filler) -> jax.Array:
    """[BR,C,...]: the pieces of x [B,T,...]; where there is no token, `filler`, or anything."""
    b, r, c = self.index.shape
    found = _take(x, self.index.reshape(b, -1)).reshape(b * r, c, *x.shape[2:])
    if filler is None:
      return found
    return jnp.where(self.index.reshape(b * r, c) < x.shape[1], found, filler)

  def tokens(self, pieces: jax.Array) -> jax.Array:
    """[B,T,...] of pieces [BR,C,...]."""
    b, r, c = self.index.shape
    return _take(pieces.reshape(b, r * c, *pieces.shape[2:]), self.place)

  def piece_rows(self) -> jax.Array:
    """i32[B,R]: each piece's row in its part of the cache; 0 for one without tokens."""
    return self.pieces(self.rows, 0)[:, 0].reshape(self.index.shape[:2])

  def latest(self, positions: jax.Array) -> jax.Array:
    """i32[BR]: the last of positions i32[B,T] in each piece's row, be it in another piece."""
    same = self.rows[:, None, :] == self.piece_rows()[:, :, None]
    return jnp.where(same, positions[:, None, :], -1).max(-1).reshape(-1)

  def split(self, x: jax.Array) -> jax.Array:
    """[B,rows/B,...]: the parts of a cache's array [rows,...]."""
    return x.reshape(len(self.rows), -1, *x.shape[1:])

  def read(self, span: LayerCache) -> LayerCache:
    """The span with the row of each piece, [BR,...]."""
    rows = self.piece_rows()
    take = lambda x: _take(self.split(x), rows).reshape(-1, *x.shape[1:])  # noqa: E731
    # Behind a barrier, or XLA for TPUs changes the layout of the whole cache to read a few rows.
    return jax.lax.optimization_barrier(jax.tree.map(take, span))


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
  """x [B,N,...] at index i32[B,M] of its second axis."""
  return jax.vmap(lambda x, index: x.at[index].get(mode='clip'))(x, index)


def spans(length: int, count: int) -> tuple[int, ...]:
  """Tokens of each span of a cache in `count` of them, fewer where it is short."""
  size = max(SPAN, -(-length // (16 * count)) * 16)
  return tuple(min(size, length - start) for start in range(0, length, size))


def cache_lengths(config: ModelConfig, length: int, slack: int, count: int = 1) -> Lengths:
  """Tokens of each layer's spans: `length` in `count`, or its window and `slack` more in one."""

  def layer(window):
    if window is None or window + slack >= length:
      return spans(length, count)
    return (window + slack,)

  return tuple(layer(config.window(i)) for i in range(config.num_layers))


def init_cache(config: ModelConfig, batch: int, lengths: Lengths, dtype) -> Cache:
  """An empty cache for `batch` rows; lengths are tokens of each layer's spans."""

  def span(length):
    k = (batch, config.num_kv_heads, config.head_dim, length)
    v = (batch, config.num_kv_heads, length, config.head_dim)
    return LayerCache(jnp.zeros(k, dtype), jnp.zeros(v, dtype))

  return tuple(tuple(map(span, layer)) for layer in lengths)


def write(
  cache: LayerCache, packing: Packing | None, index: jax.Array, k: jax.Array, v: jax.Array
) -> LayerCache:
  """A span with k, v [B,T,K,H] written at index i32[B,T] of their rows; S is nowhere."""

  def put(cache, rows, index, k, v):
    return LayerCache(
      cache.k.at[rows, :, :, index].set(k.astype(cache.k.dtype), mode='drop'),
      cache.v.at[rows, :, index].set(v.astype(cache.v.dtype), mode='drop'),
    )

  if packing is None:
    return put(cache, jnp.arange(len(k))[:, None], index, k, v)
  parts = jax.vmap(put)(jax.tree.map(packing.split, cache), packing.rows, index, k, v)
  return jax.tree.map(lambda new, old: new.reshape(old.shape), parts, cache)


def causal_mask(
  q_positions: jax.Array, k_positions: jax.Array, window: int | None, same: jax.Array | None
) -> jax.Array:
  """bool[B,T,S]: key not after the query, within the window, and where `same` bool[B,T,S]."""
  distance = q_positions[:, :, None] - k_positions[:, None, :]
  mask = distance >= 0
  if window is not None:
    mask &= distance < window
  return mask if same is None else mask & same


class View(NamedTuple):
  """What the layers of one window and cache need to know of where things lie.

  Masks are of pieces where tokens are packed: [BR,C,S] instead of [B,T,S].
  """

  index: tuple[jax.Array, ...]  # i32[B,T], where tokens go in each span; S is nowhere
  own: tuple[jax.Array, ...]  # bool[B,T,S], what queries see of each span, or of their batch
  live: tuple[jax.Array | None, ...]  # bool[], of each span: whether to look at it; None is yes
  shared: tuple[jax.Array, ...]  # bool[B,T,S], what they see of each prefix


def make_view(
  positions: jax.Array,
  prefixes: Prefixes,
  packing: Packing | None,
  lengths: tuple[int, ...],
  window: int | None,
) -> View:
  """The View of layers whose spans hold so many tokens each.

  Args:
    positions: i32[B,T]; a negative one marks padding.
    prefixes: what lies before.
    packing: of the tokens; None where each of the B is a row of the cache.
    lengths: of the spans.
    window: of the layers, in tokens.
  """
  length, lows = sum(lengths), [sum(lengths[:i]) for i in range(len(lengths))]
  starts = prefixes.lengths()
  places = (positions - (starts[:, None] if packing is None else starts)) % length
  places = jnp.where(positions < 0, length, places)

  if packing is None:
    queries, latest, of_row = positions, positions.max(1), prefixes.of_row
  else:
    queries, latest = packing.pieces(positions, -1), packing.latest(positions)
    of_row = packing.pieces(prefixes.of_row, -1)[:, 0]
  start = Prefixes(prefixes.entries, of_row).lengths()[:, None]
  # Of all tokens that have lain at a place, the latest that a row has come to lies there now.
  last = latest[:, None] - start
  held = last - (last - jnp.arange(length)) % length
  own = causal_mask(queries, held + start, window, (held >= 0)[:, None])

  def shared(number, prefix):
    place = jnp.arange(prefix.cache[0][0].k.shape[-1])[None]
    mine = (of_row == number)[:, None] & (place < prefix.length)
    return causal_mask(queries, place, window, mine[:, None])

  index, parts, live = [], [], []
  for low, size in zip(lows, lengths, strict=True):
    index.append(jnp.where((places >= low) & (places < low + size), places - low, size))
    parts.append(own[:, :, low : low + size])
    live.append(parts[-1].any() if low else None)
  others = [shared(number, prefix) for number, prefix in enumerate(prefixes.entries)]
  return View(tuple(index), tuple(parts), tuple(live), tuple(others))
