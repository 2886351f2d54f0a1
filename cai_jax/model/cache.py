"""The cache of keys and values: its shape, writes to it, and the masks of queries that read it.

`cai_jax.model.transformer` defines the axis letters. For packed tokens, B counts groups of cache
rows, R the pieces of a group, and C the tokens of a piece.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cai_jax.model.attention.mask import causal_mask
from cai_jax.model.config import ModelConfig

MIN_SPAN = 128  # tokens


class LayerCache(NamedTuple):
  """Keys and values of one span of one layer's cache.

  Keys are stored transposed, so that both products of a decode step read memory in order.

  Attributes:
    k: [B,K,H,S], rotated.
    v: [B,K,S,H].
  """

  k: jax.Array
  v: jax.Array

  @classmethod
  def from_tokens(cls, k: jax.Array, v: jax.Array) -> 'LayerCache':
    """Return the cache layout of k, v [B,T,K,H]."""
    return cls(k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3))


# For each layer, its spans: parts of the cache that a step reads or skips as a whole. They are
# separate arrays so that each can be updated in place. The i-th token of a row is at index i modulo
# the total length of the spans. A layer with full attention has room for all tokens of a row, and a
# step skips the spans that no row has reached yet. A windowed layer is a ring of one span.
Cache = tuple[tuple[LayerCache, ...], ...]
Lengths = tuple[tuple[int, ...], ...]  # for each layer, the tokens of each of its spans


class Prefix(NamedTuple):
  """A sequence of tokens with which many rows begin, cached once for all of them.

  Attributes:
    cache: a cache of one row (B = 1), with one span per layer.
    length: i32[], number of tokens; the rest of the cache is padding.
  """

  cache: Cache
  length: jax.Array


class Prefixes(NamedTuple):
  """The available prefixes, and the choice of one for each row.

  Attributes:
    entries: the prefixes.
    choice: i32[B], or i32[B,T] for packed tokens: index into `entries` of the prefix that a row
      begins with; -1 means none.
  """

  entries: tuple[Prefix, ...]
  choice: jax.Array

  def lengths(self) -> jax.Array:
    """Return the length of each row's prefix, i32 of the shape of `choice`.

    This is also the position of the first token in the row's own cache.
    """
    if not self.entries:
      return jnp.zeros_like(self.choice)
    lengths = jnp.stack([prefix.length for prefix in self.entries])
    return jnp.where(self.choice < 0, 0, lengths[self.choice])


class Packing(NamedTuple):
  """The assignment of packed tokens to the rows of a cache.

  The rows of the cache are split into B equal groups, and each group gets T tokens, which can
  belong to any of its rows. If a mesh splits rows and tokens in the same way, the devices do not
  communicate. Products with parameters use the tokens as they are, without padding. Attention uses
  them as R pieces per group, each with up to C tokens of one row.

  Attributes:
    rows: i32[B,T], the row of each token, counted within its group.
    token_index: i32[B,R,C], the index of the token at each place of each piece; T marks an empty
      place.
    piece_index: i32[B,T], the index of each token among the R × C places of its group.
  """

  rows: jax.Array
  token_index: jax.Array
  piece_index: jax.Array

  def to_pieces(self, x: jax.Array, fill: int | None) -> jax.Array:
    """Gather tokens into pieces.

    Args:
      x: [B,T,...].
      fill: value at empty places; None leaves them arbitrary.

    Returns:
      [BR,C,...].
    """
    b, r, c = self.token_index.shape
    pieces = _take(x, self.token_index.reshape(b, -1)).reshape(b * r, c, *x.shape[2:])
    if fill is None:
      return pieces
    return jnp.where(self.token_index.reshape(b * r, c) < x.shape[1], pieces, fill)

  def to_tokens(self, pieces: jax.Array) -> jax.Array:
    """Return pieces [BR,C,...] as tokens [B,T,...]; the inverse of `to_pieces`."""
    b, r, c = self.token_index.shape
    return _take(pieces.reshape(b, r * c, *pieces.shape[2:]), self.piece_index)

  def piece_rows(self) -> jax.Array:
    """Return the row i32[B,R] of each piece, counted within its group; 0 for an empty piece."""
    return self.to_pieces(self.rows, 0)[:, 0].reshape(self.token_index.shape[:2])

  def last_positions(self, positions: jax.Array) -> jax.Array:
    """Return the last position of each piece's row, as i32[BR].

    Tokens of the row in other pieces are included.

    Args:
      positions: i32[B,T], the position of each token.

    """
    same_row = self.rows[:, None, :] == self.piece_rows()[:, :, None]
    return jnp.where(same_row, positions[:, None, :], -1).max(-1).reshape(-1)

  def split_groups(self, x: jax.Array) -> jax.Array:
    """Reshape an array of the cache from [rows,...] to [B,rows/B,...]."""
    return x.reshape(len(self.rows), -1, *x.shape[1:])

  def read_rows(self, span: LayerCache) -> LayerCache:
    """Return the rows of a span to which the pieces belong, in arrays [BR,...]."""
    rows = self.piece_rows()
    take = lambda x: _take(self.split_groups(x), rows).reshape(-1, *x.shape[1:])  # noqa: E731
    # Without the barrier, XLA for TPUs changes the layout of the whole cache to read a few rows.
    return jax.lax.optimization_barrier(jax.tree.map(take, span))


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
  """Return the entries of x [B,N,...] at index i32[B,M] of its second axis."""
  return jax.vmap(lambda x, index: x.at[index].get(mode='clip'))(x, index)


def split_spans(length: int, count: int) -> tuple[int, ...]:
  """Split a cache into at most `count` spans of at least `MIN_SPAN` tokens.

  Args:
    length: number of tokens of the cache.
    count: maximum number of spans.

  Returns:
    The number of tokens of each span. All but the last are equal, and multiples of 16.
  """
  size = max(MIN_SPAN, -(-length // (16 * count)) * 16)
  return tuple(min(size, length - start) for start in range(0, length, size))


def cache_lengths(config: ModelConfig, length: int, slack: int, count: int = 1) -> Lengths:
  """Return the number of tokens of each span of each layer.

  Args:
    config: gives the window of each layer.
    length: number of tokens of a row in a layer with full attention, which is split into `count`
      spans.
    slack: number of tokens that a windowed layer keeps beyond its window. It has one span.
    count: number of spans.
  """

  def layer(window):
    if window is None or window + slack >= length:
      return split_spans(length, count)
    return (window + slack,)

  return tuple(layer(config.window(i)) for i in range(config.num_layers))


def init_cache(config: ModelConfig, batch: int, lengths: Lengths, dtype) -> Cache:
  """Return a cache of zeros.

  Args:
    config: gives the number and size of the heads.
    batch: number of rows.
    lengths: number of tokens of each span of each layer.
    dtype: dtype of the keys and values.
  """

  def span(length):
    k = (batch, config.num_kv_heads, config.head_dim, length)
    v = (batch, config.num_kv_heads, length, config.head_dim)
    return LayerCache(jnp.zeros(k, dtype), jnp.zeros(v, dtype))

  return tuple(tuple(map(span, layer)) for layer in lengths)


def write_span(
  span: LayerCache, packing: Packing | None, index: jax.Array, k: jax.Array, v: jax.Array
) -> LayerCache:
  """Write keys and values to a span of a cache.

  Args:
    span: the span, of S tokens.
    packing: the rows that the tokens belong to; None if the b-th row of `k` is row b of the cache.
    index: i32[B,T], where to write each token in its row; index S drops the write.
    k: [B,T,K,H].
    v: [B,T,K,H].

  Returns:
    The updated span.
  """

  def put(span, rows, index, k, v):
    return LayerCache(
      span.k.at[rows, :, :, index].set(k.astype(span.k.dtype), mode='drop'),
      span.v.at[rows, :, index].set(v.astype(span.v.dtype), mode='drop'),
    )

  if packing is None:
    return put(span, jnp.arange(len(k))[:, None], index, k, v)
  groups = jax.vmap(put)(jax.tree.map(packing.split_groups, span), packing.rows, index, k, v)
  return jax.tree.map(lambda new, old: new.reshape(old.shape), groups, span)


class View(NamedTuple):
  """Indices and masks that layers with the same window and cache length share.

  For packed tokens, the masks are those of pieces: [BR,C,S] instead of [B,T,S].

  Attributes:
    write_index: for each span, i32[B,T]: where to write each token; index S drops the write.
    masks: for each span, bool[B,T,S]: the keys that each query sees. Without a cache there is one
      mask, over the tokens of the batch.
    live: for each span, bool[]: whether any query sees a key of it. None means that the span is
      always read.
    prefix_masks: for each prefix, bool[B,T,S]: the keys that each query sees.
  """

  write_index: tuple[jax.Array, ...]
  masks: tuple[jax.Array, ...]
  live: tuple[jax.Array | None, ...]
  prefix_masks: tuple[jax.Array, ...]


def make_view(
  positions: jax.Array,
  prefixes: Prefixes,
  packing: Packing | None,
  lengths: tuple[int, ...],
  window: int | None,
) -> View:
  """Return the View of layers with the given spans and window.

  Args:
    positions: i32[B,T]; a negative position marks padding.
    prefixes: the prefixes, and the choice of one for each row.
    packing: the rows that the tokens belong to; None if the b-th row of tokens is row b of the
      cache.
    lengths: number of tokens of each span.
    window: number of tokens that a query sees, itself included; None means no limit.
  """
  length = sum(lengths)
  span_starts = [sum(lengths[:i]) for i in range(len(lengths))]
  first = prefixes.lengths()  # position of the first token in the row's own cache
  places = (positions - (first[:, None] if packing is None else first)) % length
  places = jnp.where(positions < 0, length, places)

  if packing is None:
    queries, last, choice = positions, positions.max(1), prefixes.choice
  else:
    queries, last = packing.to_pieces(positions, -1), packing.last_positions(positions)
    choice = packing.to_pieces(prefixes.choice, -1)[:, 0]
  first = Prefixes(prefixes.entries, choice).lengths()[:, None]
  # The cache is a ring: place p holds the latest of a row's tokens whose number is p modulo length.
  last_number = last[:, None] - first
  number = last_number - (last_number - jnp.arange(length)) % length
  own = causal_mask(queries, number + first, window, (number >= 0)[:, None])

  def prefix_mask(i, prefix):
    place = jnp.arange(prefix.cache[0][0].k.shape[-1])[None]
    chosen = (choice == i)[:, None] & (place < prefix.length)
    return causal_mask(queries, place, window, chosen[:, None])

  write_index, masks, live = [], [], []
  for start, size in zip(span_starts, lengths, strict=True):
    inside = (places >= start) & (places < start + size)
    write_index.append(jnp.where(inside, places - start, size))
    masks.append(own[:, :, start : start + size])
    live.append(masks[-1].any() if start else None)
  prefix_masks = [prefix_mask(i, prefix) for i, prefix in enumerate(prefixes.entries)]
  return View(tuple(write_index), tuple(masks), tuple(live), tuple(prefix_masks))
