"""Attention to the paged cache with a Pallas kernel for NVIDIA GPUs, compiled by Triton.

A program of the kernel takes a block of queries that share a kv head of one sequence (a decoded
row, or a piece of prefill), and reads the sequence's pages by its table, one after the other, with
a running softmax (Milakov and Gimelshein 2018; Dao et al. 2022). So it reads live pages only, and a
sequence's result depends neither on other sequences nor on where its pages are.

`cai_jax.model.transformer` and `cai_jax.model.cache` define the axis letters; Q counts sequences,
and R the queries of a sequence that share a kv head.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cai_jax.model.attention.cached import CACHED, CacheAttention
from cai_jax.model.attention.mask import MASKED
from cai_jax.model.attention.paged import (
  PieceView,
  join_pieces,
  prefix_masks,
  read_prefixes,
  row_places,
  split_pieces,
  write_page,
)
from cai_jax.model.attention.scores import Scores
from cai_jax.model.attention.softmax import PartialSoftmax, group_queries, merge, ungroup_queries
from cai_jax.model.cache import LayerCache, Prefixes, Step, init_block
from cai_jax.model.config import ModelConfig
from cai_jax.runtime.mesh import BATCH, batch_shards

LEAST = 16  # rows, columns and depth of a matrix product of the tensor cores
# Queries that a program takes together: those of a decoded row fit into the least product, and
# a piece of prefill reads its pages once for each of its blocks.
PREFILL_BLOCK = 64
# A sequence's pages are read in parts of so many, by programs of their own, whose softmaxes are
# merged. So a long row does not take longer than the others. The number is the same for
# every batch, so that the bits of a row are, too.
SPLIT_PAGES = 16


class RowSequences(NamedTuple):
  """The decoded rows.

  Attributes:
    positions: i32[G,D,W], of each row's tokens; negative for padding.
    pages: i32[G,D,N], the pages of each row in order; see `RowTable`.
    first: i32[G,D], position of the first token of the row's first page.
  """

  positions: jax.Array
  pages: jax.Array
  first: jax.Array


class TritonView(NamedTuple):
  """Indices that layers with the same window share.

  Attributes:
    page: i32[G,X], the page to which each token is written; the number of pages drops the write.
    offset: i32[G,X], the place in that page.
    rows: the decoded rows; None if there are none.
    pieces: the pieces of prefill; None if there are none.
    prefix_masks: for each prefix, bool[G,X,S]: the keys that each token sees.
  """

  page: jax.Array
  offset: jax.Array
  rows: RowSequences | None
  pieces: PieceView | None
  prefix_masks: tuple[jax.Array, ...]


def refuse(config: ModelConfig, dtype: str, page_tokens: int, mesh: Mesh) -> str | None:
  """Return why the kernel does not support a model, or None; see `cached.CacheAttention`."""
  if not _fits(config.head_dim):
    return f'needs heads of 16, 32, 64 … numbers, and the model has {config.head_dim}.'
  if not _fits(page_tokens):
    return f'needs pages of 16, 32, 64 … tokens, not engine.page_tokens={page_tokens}.'
  return None


def _fits(size: int) -> bool:
  """Return whether the kernel supports a size: a power of two, and no less than a product has."""
  return size >= LEAST and not size & (size - 1)


def make_view(
  positions: jax.Array,
  step: Step,
  index: int,
  prefixes: Prefixes,
  sizes: Sequence[int],
  page: int,
  window: int | None,
) -> TritonView:
  """Return the indices of a step; see `cached.MakeView`."""
  (total,) = sizes  # the kernel takes the pages as one array
  places, offsets, rows, pieces, decoded = [], [], None, None, positions.shape[1]
  if step.pieces is not None:
    decoded -= step.pieces.tables[index].page.shape[1]
  if step.rows:
    table = step.rows[index]
    at = positions[:, :decoded].reshape(*table.first.shape, -1)
    place, offset = row_places(at, table, page, total)
    places.append(place)
    offsets.append(offset)
    rows = RowSequences(at, table.pages, table.first)
  if step.pieces is not None:
    piece = step.pieces.tables[index]
    places.append(piece.page)
    offsets.append(piece.offset)
    tables = piece.pages, piece.num_pages, piece.first
    pieces = PieceView(positions[:, decoded:], step.pieces.start, step.pieces.number, *tables)
  place, offset = jnp.concatenate(places, 1), jnp.concatenate(offsets, 1)
  return TritonView(place, offset, rows, pieces, prefix_masks(positions, prefixes, window))


def attend_triton(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  blocks: tuple[LayerCache, ...],
  prefixes: Sequence[LayerCache],
  view: TritonView,
  window: int | None,
  width: int,
  mesh: Mesh,
  scores: Scores,
) -> tuple[jax.Array, tuple[LayerCache, ...]]:
  """Write a step's keys and values to a layer's cache, and attend to it; see `cached.Attend`."""
  read = functools.partial(
    read_sequences,
    window=window,
    scores=scores,
    interpret=mesh.devices.flat[0].platform != 'gpu',
  )
  local = functools.partial(_attend_local, width=width, read=read, scores=scores)
  args = q, k, v, blocks, tuple(prefixes), view
  if mesh.size == 1:
    return local(*args)
  batch = tuple(BATCH) if len(q) == batch_shards(mesh) else (None,)
  heads, pages = P(*batch, None, 'tensor'), P(*batch, 'tensor')
  specs = heads, heads, heads, pages, P(None, 'tensor'), P(*batch)
  return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(heads, pages), check_vma=False)(
    *args
  )


def _attend_local(q, k, v, blocks, prefixes, view, width, read, scores):
  """Compute `attend_triton` for one batch shard, whose axis G has the length 1."""
  q, k, v = q[0], k[0], v[0]
  view = jax.tree.map(lambda x: x[0], view)
  block = write_page(blocks[0], view.page, view.offset, k, v)
  kv_heads = k.shape[1]
  parts, decoded = [], 0
  if view.rows is not None:
    rows, tokens = view.rows.positions.shape
    decoded = rows * tokens
    queries = group_queries(q[:decoded].reshape(rows, tokens, *q.shape[1:]), kv_heads)
    part = read(queries, block, *view.rows)
    part = [ungroup_queries(x, tokens).reshape(decoded, *q.shape[1:-1], -1) for x in part]
    parts.append(PartialSoftmax(*part))
  if view.pieces is not None:
    queries, positions, target = split_pieces(q[decoded:], view.pieces, width)
    # No key has a place for the queries beyond a piece, so the kernel reads no page for them.
    positions = jnp.where(target < len(q) - decoded, positions, -1)
    queries = group_queries(queries, kv_heads)
    part = read(queries, block, positions, view.pieces.pages, view.pieces.first)
    parts.append(join_pieces(part, target, len(q) - decoded))
  own = PartialSoftmax(*(jnp.concatenate(x) for x in zip(*parts, strict=True)))
  shared = read_prefixes(q, kv_heads, prefixes, view.prefix_masks, scores)
  return merge([*shared, own]).divided().astype(q.dtype)[None], (block,)


def read_sequences(
  queries: jax.Array,
  block: LayerCache,
  positions: jax.Array,
  pages: jax.Array,
  first: jax.Array,
  window: int | None,
  scores: Scores,
  interpret: bool,
) -> PartialSoftmax:
  """Return the softmax [Q,K,R,...] of sequences over their pages.

  Args:
    queries: [Q,K,R,H], rotated; T queries for each of several heads, with T the faster axis.
    block: the pages.
    positions: i32[Q,T], of the queries; negative for padding, which attends to nothing.
    pages: i32[Q,N], the pages of each sequence in order; those after its last one may be anything.
    first: i32[Q], position of the first token of the first page.
    window: number of tokens that a query sees, itself included; None means no limit.
    scores: scale and cap of the scores.
    interpret: whether to run in Pallas's interpreter.
  """
  count, kv_heads, rows, h = queries.shape
  rows_of_block = min(PREFILL_BLOCK, max(LEAST, pl.next_power_of_2(rows)))
  padding = -rows % rows_of_block
  at = jnp.tile(positions, (1, rows // positions.shape[1]))
  at = jnp.pad(at, ((0, 0), (0, padding)), constant_values=-1)
  queries = jnp.pad(queries, ((0, 0), (0, 0), (0, padding), (0, 0))).astype(block.k.dtype)
  splits = -(-pages.shape[1] // SPLIT_PAGES)
  pages = jnp.clip(pages, 0, len(block.k) - 1)
  padded = rows + padding
  by_block = lambda i, head, r: (i, head, r // splits, 0)  # noqa: E731
  part = lambda i, head, r: (r % splits, i, head, r // splits)  # noqa: E731
  whole = lambda x: pl.BlockSpec(x.shape, lambda i, head, r: (0,) * x.ndim)  # noqa: E731
  f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  row_shape = splits, count, kv_heads, padded
  out, largest, total = pl.pallas_call(
    functools.partial(_kernel, splits=splits, window=window, scores=scores),
    grid=(count, kv_heads, splits * padded // rows_of_block),
    in_specs=[
      pl.BlockSpec((None, None, rows_of_block, h), by_block),
      pl.BlockSpec((None, rows_of_block), lambda i, head, r: (i, r // splits)),
      whole(pages),
      whole(first),
      whole(block.k),
      whole(block.v),
    ],
    out_specs=[
      pl.BlockSpec((None, None, None, rows_of_block, h), lambda *index: (*part(*index), 0)),
      pl.BlockSpec((None, None, None, rows_of_block), part),
      pl.BlockSpec((None, None, None, rows_of_block), part),
    ],
    out_shape=[f32((*row_shape, h)), f32(row_shape), f32(row_shape)],
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
    interpret=interpret,
    name='paged_attention',
  )(queries, at, pages, first, block.k, block.v)
  parts = [
    PartialSoftmax(largest[i, :, :, :rows, None], total[i, :, :, :rows, None], out[i, :, :, :rows])
    for i in range(splits)
  ]
  return merge(parts)


def _kernel(
  q_ref,
  at_ref,
  pages_ref,
  first_ref,
  k_ref,
  v_ref,
  out_ref,
  max_ref,
  sum_ref,
  splits,
  window,
  scores,
):
  """Compute the softmax of one block of queries over one part of the sequence's pages.

  Args:
    q_ref: [R,H].
    at_ref: i32[R], positions of the queries; negative for padding.
    pages_ref: i32[Q,N].
    first_ref: i32[Q].
    k_ref: [B,K,H,S].
    v_ref: [B,K,S,H].
    out_ref: f32[R,H], the sum of the values weighted by exp(score - max).
    max_ref: f32[R], the largest score.
    sum_ref: f32[R], the sum of the weights.
    splits: number of parts of a sequence's pages.
    window: number of tokens that a query sees, itself included; None means no limit.
    scores: scale and cap of the scores.
  """
  sequence, head, split = pl.program_id(0), pl.program_id(1), pl.program_id(2) % splits
  q, at, size, h = q_ref[...], at_ref[...], k_ref.shape[-1], q_ref.shape[-1]
  first = first_ref[sequence]
  precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
  product = functools.partial(jnp.dot, precision=precision, preferred_element_type=jnp.float32)

  def add_page(number, state):
    largest, total, out = state
    page = pages_ref[sequence, number]
    distance = at[:, None] - (first + number * size + jnp.arange(size))[None, :]
    mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    score = scores.of_products(product(q, k_ref[page, head]), h)
    score = jnp.where(mask, score, MASKED)
    new = jnp.maximum(largest, score.max(1))
    weights = jnp.where(mask, jnp.exp(score - new[:, None]), 0.0)
    scale = jnp.exp(largest - new)
    values = v_ref[page, head]
    out = out * scale[:, None] + product(weights.astype(values.dtype), values)
    return new, total * scale + weights.sum(1), out

  rows = len(at)
  empty = (
    jnp.full(rows, MASKED, jnp.float32),
    jnp.zeros(rows, jnp.float32),
    jnp.zeros((rows, h), jnp.float32),
  )
  last = at.max()
  end = jnp.where(last < 0, 0, (last - first) // size + 1)
  start = split * SPLIT_PAGES
  end = jnp.minimum(end, start + SPLIT_PAGES)
  largest, total, out = jax.lax.fori_loop(start, end, add_page, empty)
  out_ref[...], max_ref[...], sum_ref[...] = out, largest, total


CACHED.register('triton')(
  CacheAttention(
    init=init_block,
    make_view=make_view,
    attend=attend_triton,
    heads=1,
    page_axis=3,
    layouts=(None, None),
    max_blocks=1,
    platform='gpu',
    refuse=refuse,
  )
)
