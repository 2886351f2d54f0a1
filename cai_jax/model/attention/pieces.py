"""Attention of prefilled tokens to the paged cache. They come in pieces, each of one row.

`cai_jax.model.transformer` and `cai_jax.model.cache` define the axis letters.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from cai_jax.model.attention.mask import causal_mask
from cai_jax.model.attention.scores import Scores
from cai_jax.model.attention.softmax import (
  PartialSoftmax,
  group_queries,
  merge,
  read_keys,
  read_long_keys,
  ungroup_queries,
)
from cai_jax.model.cache import LayerCache, Pieces

T = TypeVar('T', jax.Array, PartialSoftmax)


class PieceView(NamedTuple):
  """What prefilled tokens read in the layers with one window; see `Pieces` and `PieceTable`."""

  positions: jax.Array
  start: jax.Array
  number: jax.Array
  pages: jax.Array
  num_pages: jax.Array
  first: jax.Array


def view_pieces(positions: jax.Array, pieces: Pieces, index: int) -> PieceView:
  """Return what prefilled tokens read.

  Args:
    positions: i32[G,T], of the prefilled tokens.
    pieces: the pieces.
    index: index of the window's tables.
  """
  table = pieces.tables[index]
  return PieceView(
    positions, pieces.start, pieces.number, table.pages, table.num_pages, table.first
  )


def attend_pieces(
  q: jax.Array,
  blocks: Sequence[LayerCache],
  view: PieceView,
  window: int | None,
  width: int,
  scores: Scores,
) -> PartialSoftmax:
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


def attend_gathered_pieces(
  q: jax.Array,
  blocks: Sequence[LayerCache],
  view: PieceView,
  window: int | None,
  width: int,
  scores: Scores,
) -> PartialSoftmax:
  """Return `attend_pieces` of all pieces at once, from copies of their pages.

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
  part = read_long_keys(queries, k, v, mask, scores)
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
