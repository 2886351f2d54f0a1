"""Attention of a step's tokens to the paged cache, and to shared prefixes.

Decoded rows: every page that a program gets is read once, in place, by the row that owns it. Each
page gives a partial softmax; those of a row are merged in the order of its pages. Prefilled tokens:
each piece reads its pages one after the other. Both read live pages only, and neither depends on
where a row's pages are, nor on other rows.

`cai_jax.model.transformer` and `cai_jax.model.cache` define the axis letters.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cai_jax.model.attention.cached import CACHED, CacheAttention, attend_by_shard
from cai_jax.model.attention.mask import MASKED, causal_mask
from cai_jax.model.attention.pieces import (
  PieceView,
  attend_gathered_pieces,
  attend_pieces,
  view_pieces,
)
from cai_jax.model.attention.scores import Scores
from cai_jax.model.attention.softmax import (
  PartialSoftmax,
  group_queries,
  merge,
  read_keys,
  read_long_keys,
  read_pages,
  ungroup_queries,
)
from cai_jax.model.cache import LayerCache, Prefixes, RowTable, Step, init_block

HEADS = 1  # axis of the pages that counts heads


class RowView(NamedTuple):
  """What decoded rows read in the layers with one window.

  Attributes:
    owner: i32[G,P], as in `RowTable`, but 0 for a page without owner.
    mask: bool[G,P,W,S], the keys of each page that the owner's tokens see.
    pages: i32[G,D,N], as in `RowTable`.
    longest: i32[G], the largest number of pages of a row.
  """

  owner: jax.Array
  mask: jax.Array
  pages: jax.Array
  longest: jax.Array


class View(NamedTuple):
  """Indices and masks that layers with the same window share.

  Attributes:
    block: for each block, i32[G,X]: the page in it to which each token is written; the number of
      its pages drops the write.
    offset: i32[G,X], the place in that page.
    rows: what decoded rows read; None if there are none.
    pieces: what prefilled tokens read; None if there are none.
    prefix_masks: for each prefix, bool[G,X,S]: the keys that each token sees.
  """

  block: tuple[jax.Array, ...]
  offset: jax.Array
  rows: RowView | None
  pieces: PieceView | None
  prefix_masks: tuple[jax.Array, ...]


def make_view(
  positions: jax.Array,
  step: Step,
  index: int,
  prefixes: Prefixes,
  sizes: Sequence[int],
  page: int,
  window: int | None,
) -> View:
  """Return the View of the layers with one window.

  Args:
    positions: i32[G,X]; a negative position marks padding.
    step: where the tokens are in the cache.
    index: index of the window's tables in `step`.
    prefixes: the prefixes, and the choice of one for each token.
    sizes: number of pages of each block in one batch shard.
    page: S, number of tokens of a page.
    window: number of tokens that a query sees, itself included; None means no limit.
  """
  total = sum(sizes)
  place, offset, decoded = find_places(positions, step, index, page, total)
  rows = pieces = None
  if step.rows:
    table = step.rows[index]
    at = positions[:, :decoded].reshape(*table.first.shape, -1)
    owner = jnp.maximum(table.owner, 0)
    queries = jnp.take_along_axis(at, owner[:, :, None], 1)  # [G,P,W]
    keys = table.start[:, :, None] + jnp.arange(page)
    owned = (table.owner >= 0)[:, :, None, None]
    mask = jax.vmap(causal_mask, (0, 0, None, 0))(queries, keys, window, owned)
    # A page that no decoded row owns is not in the rows' lists, so what it gives does not matter.
    longest = (table.pages < total).sum(2).max(1)
    rows = RowView(owner, mask, table.pages, longest)
  if step.pieces is not None:
    pieces = view_pieces(positions[:, decoded:], step.pieces, index)
  starts = [sum(sizes[:i]) for i in range(len(sizes))]
  block = [
    jnp.where((place >= start) & (place < start + size), place - start, size)
    for start, size in zip(starts, sizes, strict=True)
  ]

  return View(tuple(block), offset, rows, pieces, prefix_masks(positions, prefixes, window))


def find_places(
  positions: jax.Array, step: Step, index: int, page: int, total: int
) -> tuple[jax.Array, jax.Array, int]:
  """Return where a step's tokens are written, and how many of them are of decoded rows.

  Args:
    positions: i32[G,X]; negative for padding.
    step: the tables.
    index: index of the window's tables.
    page: S, number of tokens of a page.
    total: number of pages, which stands for no page: it drops the write.

  Returns:
    i32[G,X], the page of each token; i32[G,X], its place there; and D · W.
  """
  parts, decoded = [], positions.shape[1]
  if step.pieces is not None:
    piece = step.pieces.tables[index]
    decoded -= piece.page.shape[1]
  if step.rows:
    table = step.rows[index]
    parts.append(_row_places(positions[:, :decoded], table, page, total))
  if step.pieces is not None:
    parts.append((piece.page, piece.offset))
  place, offset = (jnp.concatenate(x, 1) for x in zip(*parts, strict=True))
  return place, offset, decoded


def _row_places(positions, table: RowTable, page: int, total: int) -> tuple[jax.Array, jax.Array]:
  """Return `find_places` of decoded rows."""
  at = positions.reshape(*table.first.shape, -1)
  number = at - table.first[:, :, None]
  pages = jnp.take_along_axis(table.pages, jnp.maximum(number // page, 0), 2, mode='clip')
  place = jnp.where(at < 0, total, pages)
  return place.reshape(positions.shape), (number % page).reshape(positions.shape)


def prefix_masks(
  positions: jax.Array, prefixes: Prefixes, window: int | None
) -> tuple[jax.Array, ...]:
  """Return for each shared prefix bool[G,X,S], the keys that each token sees."""

  def mask(i, prefix):
    layer = next(layer for layer in prefix.cache if isinstance(layer, LayerCache))
    keys = jnp.arange(layer.k.shape[-1])[None]
    chosen = (prefixes.choice == i)[:, :, None] & (keys < prefix.length)[:, None]
    return causal_mask(positions, keys, window, chosen)

  return tuple(mask(i, prefix) for i, prefix in enumerate(prefixes.entries))


def attend_paged(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  blocks: tuple[LayerCache, ...],
  prefixes: Sequence[LayerCache],
  view: View,
  window: int | None,
  width: int,
  mesh: Mesh,
  scores: Scores,
  sinks: jax.Array | None = None,
) -> tuple[jax.Array, tuple[LayerCache, ...]]:
  """Write a step's keys and values to a layer's cache, and attend to it.

  Each device computes its own rows and heads; they do not communicate.

  Args:
    q: [G,X,N,H], rotated.
    k: [G,X,K,H], rotated.
    v: [G,X,K,H].
    blocks: the layer's blocks, [G·P,...]. Batch shards are their leading axis.
    prefixes: the layer's keys and values of each shared prefix.
    view: indices and masks of the layer.
    window: the layer's window.
    width: C, number of tokens of a piece.
    mesh: the mesh over which rows and heads are split.
    scores: scale and cap of the scores.
    sinks: f32[N], a further score of each head, or None.

  Returns:
    The output [G,X,N,H] in the dtype of `q`, and the updated blocks.
  """
  on_cpu = mesh.devices.flat[0].platform == 'cpu'
  local = functools.partial(_attend_local, window=window, width=width, on_cpu=on_cpu, scores=scores)
  return attend_by_shard(local, HEADS, mesh, q, k, v, blocks, tuple(prefixes), view, sinks)


def _attend_local(q, k, v, blocks, prefixes, view, sinks, window, width, on_cpu, scores):
  """Compute `attend_paged` for one batch shard, whose axis G has the length 1."""
  q, k, v = q[0], k[0], v[0]
  view = jax.tree.map(lambda x: x[0], view)
  blocks = tuple(
    LayerCache(
      block.k.at[page, :, :, view.offset].set(k.astype(block.k.dtype), mode='drop'),
      block.v.at[page, :, view.offset].set(v.astype(block.v.dtype), mode='drop'),
    )
    for block, page in zip(blocks, view.block, strict=True)
  )
  kv_heads = k.shape[1]
  parts, decoded = [], 0
  if view.rows is not None:
    tokens = view.rows.mask.shape[1]
    decoded = tokens * len(view.rows.pages)
    queries = q[:decoded].reshape(-1, tokens, *q.shape[1:])
    part = _attend_rows(group_queries(queries, kv_heads), blocks, view.rows, on_cpu, scores)
    part = [ungroup_queries(x, tokens).reshape(decoded, *q.shape[1:-1], -1) for x in part]
    parts.append(PartialSoftmax(*part))
  if view.pieces is not None:
    attend = attend_pieces if on_cpu else attend_gathered_pieces
    parts.append(attend(q[decoded:], blocks, view.pieces, window, width, scores))
  own = PartialSoftmax(*(jnp.concatenate(x) for x in zip(*parts, strict=True)))
  out = merge_prefixes(own, q, kv_heads, prefixes, view.prefix_masks, scores, sinks)
  return out, blocks


def merge_prefixes(
  own: PartialSoftmax,
  q: jax.Array,
  kv_heads: int,
  prefixes: Sequence[LayerCache],
  masks: Sequence[jax.Array],
  scores: Scores,
  sinks: jax.Array | None,
) -> jax.Array:
  """Return the output [1,X,N,H] of a step's tokens over their own pages and the shared prefixes.

  Args:
    own: the softmax [X,N,...] over their own pages.
    q: [X,N,H], rotated.
    kv_heads: K.
    prefixes: the layer's keys and values of each prefix.
    masks: for each prefix, bool[X,S], the keys that each token sees.
    scores: scale and cap of the scores.
    sinks: f32[N], a further score of each head, or None.
  """

  def read(cache, mask):
    part = read_long_keys(group_queries(q, kv_heads), cache.k[0], cache.v[0], mask, scores)
    return PartialSoftmax(*(ungroup_queries(x, len(q)) for x in part))

  whole = merge([*(read(*prefix) for prefix in zip(prefixes, masks, strict=True)), own])
  whole = whole if sinks is None else whole.with_sinks(sinks)
  return whole.divided().astype(q.dtype)[None]


def _attend_rows(queries, blocks, view: RowView, on_cpu: bool, scores) -> PartialSoftmax:
  """Return the softmax of decoded rows [D,K,R,...] over their pages, for queries [D,K,R,H]."""
  read, parts, start = read_pages if on_cpu else read_keys, [], 0
  for block in blocks:
    end = start + len(block.k)
    by_page = queries.at[view.owner[start:end]].get(mode='promise_in_bounds')
    by_page = by_page.astype(jnp.float32) if on_cpu else by_page
    parts.append(read(by_page, block.k, block.v, view.mask[start:end], scores))
    start = end
  pages = PartialSoftmax(*(jnp.concatenate(x) for x in zip(*parts, strict=True)))

  def take(index):
    """Return pages at an index; an absent page gets the weight 0."""
    present = (index < start)[..., None, None, None]
    index = jnp.minimum(index, start - 1)
    page = PartialSoftmax(*(x.at[index].get(mode='promise_in_bounds') for x in pages))
    return page._replace(max=jnp.where(present, page.max, MASKED))

  if not on_cpu:  # a loop of unknown length would make every layer wait for the host
    number = view.pages.shape[1]
    return merge([take(view.pages[:, i]) for i in range(number)])

  def add(number, part):
    return merge([part, take(jax.lax.dynamic_index_in_dim(view.pages, number, 1, keepdims=False))])

  empty = PartialSoftmax.empty(queries.shape[:-1], queries.shape[-1])
  return jax.lax.fori_loop(0, view.longest, add, empty)


# On TPUs a step writes one token's keys for all heads, so the memory layout is that of [B,S,K,H].
# With any other input or output layout, every call would copy the whole cache twice.
CACHED.register('pages')(
  CacheAttention(
    init=init_block,
    make_view=make_view,
    attend=attend_paged,
    heads=HEADS,
    page_axis=3,
    layouts=((0, 3, 1, 2), (0, 2, 1, 3)),
  )
)
