"""Attention of a step's tokens to the paged cache, and to shared prefixes.

Decoded rows: every page that a program gets is read once, in place, by the row that owns it. Each
page gives a partial softmax; those of a row are merged in the order of its pages. Prefilled tokens:
each piece reads its pages one after the other. Both read live pages only, and neither depends on
where a row's pages are, nor on other rows.

`cai_jax.model.transformer` and `cai_jax.model.cache` define the axis letters.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cai_jax.model.attention.cached import CACHED, CacheAttention
from cai_jax.model.attention.mask import MASKED, causal_mask
from cai_jax.model.attention.scores import Scores
from cai_jax.model.attention.softmax import (
  PartialSoftmax,
  group_queries,
  merge,
  read_keys,
  read_pages,
  ungroup_queries,
)
from cai_jax.model.cache import LayerCache, Prefixes, RowTable, Step, init_block
from cai_jax.runtime.mesh import BATCH, batch_shards

T = TypeVar('T', jax.Array, PartialSoftmax)


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


class PieceView(NamedTuple):
  """What prefilled tokens read in the layers with one window; see `Pieces` and `PieceTable`."""

  positions: jax.Array
  start: jax.Array
  number: jax.Array
  pages: jax.Array
  num_pages: jax.Array
  first: jax.Array


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
  total, places, offsets, rows, pieces, decoded = sum(sizes), [], [], None, None, 0
  if step.rows:
    table = step.rows[index]
    g, d = table.first.shape
    decoded = (
      positions.shape[1]
      if step.pieces is None
      else positions.shape[1] - step.pieces.tables[index].page.shape[1]
    )
    at = positions[:, :decoded].reshape(g, d, -1)
    place, offset = row_places(at, table, page, total)
    places.append(place)
    offsets.append(offset)
    owner = jnp.maximum(table.owner, 0)
    queries = jnp.take_along_axis(at, owner[:, :, None], 1)  # [G,P,W]
    keys = table.start[:, :, None] + jnp.arange(page)
    owned = (table.owner >= 0)[:, :, None, None]
    mask = jax.vmap(causal_mask, (0, 0, None, 0))(queries, keys, window, owned)
    # A page that no decoded row owns is not in the rows' lists, so what it gives does not matter.
    longest = (table.pages < total).sum(2).max(1)
    rows = RowView(owner, mask, table.pages, longest)
  if step.pieces is not None:
    piece = step.pieces.tables[index]
    places.append(piece.page)
    offsets.append(piece.offset)
    tables = piece.pages, piece.num_pages, piece.first
    pieces = PieceView(positions[:, decoded:], step.pieces.start, step.pieces.number, *tables)
  place, offset = jnp.concatenate(places, 1), jnp.concatenate(offsets, 1)
  starts = [sum(sizes[:i]) for i in range(len(sizes))]
  block = [
    jnp.where((place >= start) & (place < start + size), place - start, size)
    for start, size in zip(starts, sizes, strict=True)
  ]

  return View(tuple(block), offset, rows, pieces, prefix_masks(positions, prefixes, window))


def row_places(
  at: jax.Array, table: RowTable, page: int, total: int
) -> tuple[jax.Array, jax.Array]:
  """Return the page to which each token of decoded rows is written, and its place: i32[G,D·W].

  Args:
    at: i32[G,D,W], positions; negative for padding.
    table: the rows' pages.
    page: S, number of tokens of a page.
    total: number of pages, which drops the write of padding.
  """
  number = at - table.first[:, :, None]
  pages = jnp.take_along_axis(table.pages, jnp.maximum(number // page, 0), 2, mode='clip')
  pages = jnp.where(at < 0, total, pages)
  return pages.reshape(len(at), -1), (number % page).reshape(len(at), -1)


def prefix_masks(
  positions: jax.Array, prefixes: Prefixes, window: int | None
) -> tuple[jax.Array, ...]:
  """Return for each shared prefix bool[G,X,S], the keys that each token sees."""

  def mask(i, prefix):
    keys = jnp.arange(prefix.cache[0].k.shape[-1])[None]
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
  args = q, k, v, blocks, tuple(prefixes), view, sinks
  if mesh.size == 1:
    return local(*args)
  # The prefill of a shared prefix has a single group, which every batch shard computes as a whole.
  batch = tuple(BATCH) if len(q) == batch_shards(mesh) else (None,)
  heads, pages = P(*batch, None, 'tensor'), P(*batch, 'tensor')
  specs = heads, heads, heads, pages, P(None, 'tensor'), P(*batch), P('tensor')
  return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(heads, pages), check_vma=False)(
    *args
  )


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
    attend_pieces = _attend_pieces if on_cpu else _attend_gathered_pieces
    parts.append(attend_pieces(q[decoded:], blocks, view.pieces, window, width, scores))
  own = PartialSoftmax(*(jnp.concatenate(x) for x in zip(*parts, strict=True)))
  shared = read_prefixes(q, kv_heads, prefixes, view.prefix_masks, scores)
  whole = merge([*shared, own])
  whole = whole if sinks is None else whole.with_sinks(sinks)
  return whole.divided().astype(q.dtype)[None], blocks


def read_prefixes(
  q: jax.Array,
  kv_heads: int,
  prefixes: Sequence[LayerCache],
  masks: Sequence[jax.Array],
  scores: Scores,
) -> list[PartialSoftmax]:
  """Return the softmax [X,N,...] of a step's tokens over each shared prefix.

  Args:
    q: [X,N,H], rotated.
    kv_heads: K.
    prefixes: the layer's keys and values of each prefix.
    masks: for each prefix, bool[X,S], the keys that each token sees.
    scores: scale and cap of the scores.
  """

  def read(cache, mask):
    part = read_keys(group_queries(q, kv_heads), cache.k[0], cache.v[0], mask, scores)
    return PartialSoftmax(*(ungroup_queries(x, len(q)) for x in part))

  return [read(*prefix) for prefix in zip(prefixes, masks, strict=True)]


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


def _attend_pieces(q, blocks, view: PieceView, window, width, scores) -> PartialSoftmax:
  """Return the softmax of prefilled tokens [T,N,...] over their pages, for q [T,N,H]."""
  length, n, h = q.shape
  kv_heads, size = blocks[0].k.shape[1], blocks[0].k.shape[-1]
  # A piece may end before `width` tokens; what it computes beyond is overwritten by the next piece.
  q = jnp.pad(q, ((0, width), (0, 0), (0, 0)))
  positions = jnp.pad(view.positions, (0, width), constant_values=-1)
  starts = [sum(len(block.k) for block in blocks[:i]) for i in range(len(blocks))]

  def read_page(page):
    def read(block, start):
      at = jnp.clip(page - start, 0, len(block.k) - 1)
      return tuple(jax.lax.dynamic_index_in_dim(x, at, keepdims=False) for x in block)

    if len(blocks) == 1:
      return read(blocks[0], 0)
    number = jnp.sum(page >= jnp.array(starts)) - 1
    branches = [functools.partial(read, *x) for x in zip(blocks, starts, strict=True)]
    return jax.lax.switch(number, branches)

  def add_piece(piece, whole):
    start = view.start[piece]
    at = jax.lax.dynamic_slice_in_dim(positions, start, width)
    queries = group_queries(jax.lax.dynamic_slice_in_dim(q, start, width), kv_heads)

    def add_page(number, part):
      at_keys = view.first[piece] + number * size + jnp.arange(size)
      mask = causal_mask(at[None], at_keys[None], window)[0]
      keys = read_page(view.pages[piece, number])
      return merge([part, read_keys(queries, *keys, mask, scores)])

    empty = PartialSoftmax.empty(queries.shape[:-1], h)
    part = jax.lax.fori_loop(0, view.num_pages[piece], add_page, empty)

    def put(x, new):
      return jax.lax.dynamic_update_slice_in_dim(x, ungroup_queries(new, width), start, 0)

    return jax.tree.map(put, whole, part)

  whole = PartialSoftmax.empty((length + width, n), h)
  whole = jax.lax.fori_loop(0, view.number, add_piece, whole)
  return jax.tree.map(lambda x: x[:length], whole)


def _attend_gathered_pieces(q, blocks, view: PieceView, window, width, scores) -> PartialSoftmax:
  """Return `_attend_pieces` of all pieces at once, from copies of their pages.

  GPUs gather fast, and a loop of unknown length would make every layer wait for the host.
  """
  h = q.shape[-1]
  kv_heads, size = blocks[0].k.shape[1], blocks[0].k.shape[-1]
  piece_q, positions, target = split_pieces(q, view, width)
  queries = group_queries(piece_q, kv_heads)
  shape = *view.pages.shape, *blocks[0].k.shape[1:]
  k = jnp.zeros(shape, blocks[0].k.dtype)
  v = jnp.zeros((*shape[:3], size, h), blocks[0].v.dtype)
  start = 0
  for block in blocks:
    inside = (view.pages >= start) & (view.pages < start + len(block.k))
    index = jnp.where(inside, view.pages - start, len(block.k))
    k += block.k.at[index].get(mode='fill', fill_value=0)
    v += block.v.at[index].get(mode='fill', fill_value=0)
    start += len(block.k)
  pieces, pages = view.pages.shape
  k = jnp.moveaxis(k, 1, 3).reshape(pieces, kv_heads, h, pages * size)
  v = jnp.moveaxis(v, 1, 2).reshape(pieces, kv_heads, pages * size, h)
  keys = view.first[:, None] + jnp.arange(pages * size)
  listed = jnp.arange(pages * size) < view.num_pages[:, None] * size
  mask = causal_mask(positions, keys, window, listed[:, None])
  part = read_keys(queries, k, v, mask, scores)
  return join_pieces(part, target, len(q))


def split_pieces(
  q: jax.Array, view: PieceView, width: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Return the queries [R,C,N,H] of each piece, their positions, and where they come from.

  Args:
    q: [T,N,H], of all prefilled tokens.
    view: the pieces.
    width: C, number of tokens of a piece.

  Returns:
    The queries; i32[R,C], their positions; and i32[R,C], their indices in `q`. A piece ends where
    the next one starts: the queries beyond have the index T, and what they attend to is dropped.
  """
  length, pieces = len(q), len(view.start)
  tokens = view.start[:, None] + jnp.arange(width)
  end = jnp.concatenate([view.start[1:], jnp.full(1, length)])
  end = jnp.where(jnp.arange(pieces) + 1 < view.number, end, length)
  valid = (tokens < end[:, None]) & (jnp.arange(pieces) < view.number)[:, None]
  positions = view.positions.at[tokens].get(mode='clip')
  return q.at[tokens].get(mode='clip'), positions, jnp.where(valid, tokens, length)


def join_pieces(parts: T, target: jax.Array, length: int) -> T:
  """Return what pieces give, [R,K,C·N/K,...], for all prefilled tokens: [T,N,...].

  Args:
    parts: an array, or a PartialSoftmax.
    target: i32[R,C], as `split_pieces` returns it.
    length: T.
  """

  def join(x):
    x = ungroup_queries(x, target.shape[1])
    return jnp.zeros((length, *x.shape[2:]), x.dtype).at[target].set(x, mode='drop')

  return jax.tree.map(join, parts)


# On TPUs a step writes one token's keys for all heads, so the memory layout is that of [B,S,K,H].
# With any other input or output layout, every call would copy the whole cache twice.
CACHED.register('pages')(
  CacheAttention(
    init=init_block,
    make_view=make_view,
    attend=attend_paged,
    heads=1,
    page_axis=3,
    layouts=((0, 3, 1, 2), (0, 2, 1, 3)),
  )
)
