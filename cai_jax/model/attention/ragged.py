"""Attention to the paged cache with JAX's ragged paged attention, a Pallas kernel for TPUs.

The kernel takes one flat batch of tokens of many sequences: a decoded row and a piece of prefill
are sequences alike. It fetches the pages of each sequence by its table, so it reads live pages
only. Source: jax.experimental.pallas.ops.tpu.ragged_paged_attention.

`cai_jax.model.transformer` and `cai_jax.model.cache` define the axis letters; Q counts sequences.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel as ragged
from jax.sharding import Mesh

from cai_jax.model.attention.cached import CACHED, CacheAttention, attend_by_shard
from cai_jax.model.attention.mask import MASKED
from cai_jax.model.attention.paged import find_places, merge_prefixes, prefix_masks
from cai_jax.model.attention.scores import PLAIN, Scores
from cai_jax.model.attention.softmax import (
  PartialSoftmax,
)
from cai_jax.model.cache import LayerCache, Pieces, Prefixes, RowTable, Step
from cai_jax.model.config import ModelConfig

HEADS = 2  # axis of the pages that counts heads
LANES = 128  # head sizes are multiples of this
PAGE_MULTIPLE = 16  # tokens; page sizes are multiples of this
# The kernel fetches keys in blocks, and the last block of a row whole. So it reads half a
# block more than the live keys for each row, on average. Smaller blocks make short transfers.
BLOCK_BYTES = 2**18
MIN_BLOCK, MAX_BLOCK = 128, 256  # tokens
# Tokens of the flat batch that the kernel processes together, in a program that decodes rows and in
# one that only prefills. For each such block it fetches all keys of the rows with tokens in it.
BLOCK_QUERIES, PREFILL_QUERIES = 32, 128


class RaggedPages(NamedTuple):
  """Pages of one layer.

  Attributes:
    kv: [B,S,2K,H]; B counts pages and S the tokens of a page. The keys and the values of a head
      are next to each other: k of head 0, v of head 0, k of head 1 and so on.
  """

  kv: jax.Array


class RaggedView(NamedTuple):
  """The tables of the kernel, which layers with the same window share.

  Attributes:
    page: i32[G,X], the page to which each token is written; the number of pages drops the write.
    offset: i32[G,X], the place in that page.
    order: i32[G,X], the tokens in the order of the sequences, padding last; None if they are.
    rank: i32[G,X], the inverse of `order`.
    pages: i32[G,Q,N], the pages of each sequence in order.
    length: i32[G,Q], number of keys in those pages.
    start: i32[G,Q+1], index in `order` of the first token of each sequence.
    num_sequences: i32[G,1], number of sequences; the tables of the others are padding.
    prefix_masks: for each prefix, bool[G,X,S]: the keys that each token sees.
  """

  page: jax.Array
  offset: jax.Array
  order: jax.Array | None
  rank: jax.Array | None
  pages: jax.Array
  length: jax.Array
  start: jax.Array
  num_sequences: jax.Array
  prefix_masks: tuple[jax.Array, ...]


class Sequences(NamedTuple):
  """Sequences of the flat batch, in its order.

  Attributes:
    tokens: i32[G,Q], number of tokens; 0 marks padding.
    length: i32[G,Q], number of keys in the pages.
    pages: i32[G,Q,N].
  """

  tokens: jax.Array
  length: jax.Array
  pages: jax.Array


def init_pages(heads: int, head_dim: int, pages: int, size: int, dtype) -> RaggedPages:
  """Return pages of zeros for one layer; see `cached.Init`."""
  return RaggedPages(jnp.zeros((pages, size, 2 * heads, head_dim), dtype))


def refuse(config: ModelConfig, dtype: str, page_tokens: int, mesh: Mesh) -> str | None:
  """Return why the kernel does not support a model, or None; see `cached.CacheAttention`."""
  for head_dim in dict.fromkeys(kind.head_dim for kind in config.kinds):
    if head_dim % LANES:
      return f'needs heads of a multiple of {LANES} numbers, and the model has {head_dim}.'
  if dtype not in ('bfloat16', 'float32'):
    return f'computes in bfloat16 or float32, not in {dtype}.'
  if not takes_pages(page_tokens):
    return (
      f'needs pages of a multiple of {PAGE_MULTIPLE} tokens, not engine.page_tokens={page_tokens}.'
    )
  tensor = mesh.shape['tensor']
  for kv_heads in dict.fromkeys(kind.kv_heads for kind in config.kinds):
    try:
      heads = config.num_heads // tensor, 2 * kv_heads // tensor
      ragged.get_min_heads_per_blk(*heads, jnp.dtype(dtype), jnp.dtype(dtype))
    except ValueError:
      return f'does not support {kv_heads} key-value heads with mesh.tensor={tensor}.'
  return None


def takes_pages(tokens: int) -> bool:
  """Return whether the kernel supports pages of so many tokens."""
  return tokens % PAGE_MULTIPLE == 0


def make_view(
  positions: jax.Array,
  step: Step,
  index: int,
  prefixes: Prefixes,
  sizes: Sequence[int],
  page: int,
  window: int | None,
) -> RaggedView:
  """Return the tables of the kernel; see `cached.MakeView`."""
  (total,) = sizes  # the kernel takes the pages as one array
  to, offset, decoded = find_places(positions, step, index, page, total)
  parts = []
  if step.rows:
    parts.append(_row_sequences(positions[:, :decoded], step.rows[index]))
  if step.pieces is not None:
    parts.append(_piece_sequences(positions[:, decoded:], step.pieces, index))
  tokens, length, pages = (jnp.concatenate(x, 1) for x in zip(*parts, strict=True))
  order = rank = None
  if step.rows:  # rows may end, so the tokens of the others move together
    order = jnp.argsort(positions < 0, axis=1, stable=True)
    rank = jnp.argsort(order, axis=1)
    first = jnp.argsort(tokens == 0, axis=1, stable=True)
    tokens, length = (jnp.take_along_axis(x, first, 1) for x in (tokens, length))
    pages = jnp.take_along_axis(pages, first[:, :, None], 1)
  start = jnp.pad(jnp.cumsum(tokens, 1), ((0, 0), (1, 0)))
  count = (tokens > 0).sum(1, keepdims=True)
  pages = jnp.where(pages < total, pages, 0)  # the kernel reads no page beyond `length`
  pages, length, start, count = (x.astype(jnp.int32) for x in (pages, length, start, count))
  masks = prefix_masks(positions, prefixes, window)
  return RaggedView(to, offset, order, rank, pages, length, start, count, masks)


def _row_sequences(positions, table: RowTable) -> Sequences:
  """Return the sequences of decoded rows; their tokens of padding are the last of each row."""
  at = positions.reshape(*table.first.shape, -1)
  tokens = (at >= 0).sum(2)
  length = jnp.where(tokens > 0, at.max(2) + 1 - table.first, 0)
  return Sequences(tokens, length, table.pages)


def _piece_sequences(positions, pieces: Pieces, index: int) -> Sequences:
  """Return the sequences of prefilled tokens, one for each piece."""
  table = pieces.tables[index]
  end = (positions >= 0).sum(1)
  used = jnp.arange(pieces.start.shape[1]) < pieces.number[:, None]
  start = jnp.where(used, pieces.start, end[:, None])
  stop = jnp.concatenate([start[:, 1:], end[:, None]], 1)
  last = jnp.take_along_axis(positions, jnp.maximum(stop - 1, 0), 1)
  length = jnp.where(used, last + 1 - table.first, 0)
  return Sequences(stop - start, length, table.pages)


def attend_ragged(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  blocks: tuple[RaggedPages, ...],
  prefixes: Sequence[LayerCache],
  view: RaggedView,
  window: int | None,
  width: int,
  mesh: Mesh,
  scores: Scores,
  sinks: jax.Array | None = None,
) -> tuple[jax.Array, tuple[RaggedPages, ...]]:
  """Write a step's keys and values to a layer's cache, and attend to it; see `cached.Attend`."""
  interpret = mesh.devices.flat[0].platform != 'tpu'
  local = functools.partial(_attend_local, window=window, interpret=interpret, scores=scores)
  return attend_by_shard(local, HEADS, mesh, q, k, v, blocks, tuple(prefixes), view, sinks)


def _attend_local(q, k, v, blocks, prefixes, view, sinks, window, interpret, scores):
  """Compute `attend_ragged` for one batch shard, whose axis G has the length 1."""
  q, k, v = q[0], k[0], v[0]
  view = jax.tree.map(lambda x: x[0], view)
  (block,) = blocks
  new = jnp.stack([k, v], 2).reshape(len(k), -1, k.shape[-1])  # [X,2K,H]
  kv = block.kv.at[view.page, view.offset].set(new.astype(block.kv.dtype), mode='drop')
  ordered = q if view.order is None else q[view.order]
  tables = view.length, view.pages, view.start, view.num_sequences
  together = PREFILL_QUERIES if view.order is None else BLOCK_QUERIES
  has_sums = bool(prefixes) or sinks is not None
  out, summed = call_kernel(ordered, kv, *tables, together, window, has_sums, interpret, scores)
  # What the kernel leaves in the place of padding may be anything.
  valid = (jnp.arange(len(q)) < view.start[-1])[:, None, None]
  out = jnp.where(valid, out, 0)
  out = out if view.rank is None else out[view.rank]
  if not has_sums:
    return out[None], (RaggedPages(kv),)
  summed = jnp.where(valid, summed[..., None], MASKED)
  summed = summed if view.rank is None else summed[view.rank]
  own = PartialSoftmax(summed, jnp.ones_like(summed), out.astype(jnp.float32))
  out = merge_prefixes(own, q, k.shape[1], prefixes, view.prefix_masks, scores, sinks)
  return out, (RaggedPages(kv),)


def block_pages(page_tokens: int, row_pages: int, token_bytes: int) -> int:
  """Return how many pages the kernel fetches together.

  Args:
    page_tokens: number of tokens of a page.
    row_pages: N, the largest number of pages of a row.
    token_bytes: size of a token's keys and values in the heads of this device.
  """
  tokens = min(max(BLOCK_BYTES // token_bytes, MIN_BLOCK), MAX_BLOCK)
  return min(max(tokens // page_tokens, 1), row_pages)


def call_kernel(
  q: jax.Array,
  kv: jax.Array,
  length: jax.Array,
  pages: jax.Array,
  start: jax.Array,
  count: jax.Array,
  together: int,
  window: int | None,
  has_sums: bool,
  interpret: bool,
  scores: Scores = PLAIN,
) -> tuple[jax.Array, jax.Array | None]:
  """Call the kernel, and return what it does not: the logarithm of each softmax's sum.

  The body of the kernel is JAX's. Its own wrapper keeps sums and maxima in scratch memory; here
  they are further outputs, so that the keys of a shared prefix can be merged.

  Args:
    q: [X,N,H].
    kv: [B,S,2K,H].
    length, pages, start, count: of one batch shard, as in `RaggedView`.
    together: number of tokens that the kernel processes together.
    window: the layer's window.
    has_sums: whether to return the logarithms.
    interpret: whether to run in Pallas's interpreter.
    scores: scale and cap of the scores.

  Returns:
    The output [X,N,H] in the dtype of `q`, and f32[X,N], the logarithm of the sum of exp(score)
    over the keys of each query, or None. Both are undefined for padding.
  """
  (x, n, h), (_, size, pairs, _) = q.shape, kv.shape
  heads, pairs_of_block = ragged.get_min_heads_per_blk(n, pairs, q.dtype, kv.dtype)
  share, kv_heads = n // (pairs // 2), pairs_of_block // 2
  queries = min(together, x)
  fetched = block_pages(size, pages.shape[1], pairs * h * kv.dtype.itemsize)
  body = functools.partial(
    ragged.ragged_paged_attention_kernel,
    sm_scale=scores.factor(h),
    sliding_window=window,
    soft_cap=scores.cap,
  )
  scratch = [
    pltpu.VMEM((2, fetched, size, pairs_of_block, h), kv.dtype),
    pltpu.SemaphoreType.DMA((2,)),
    pltpu.VMEM((queries, heads, h), jnp.float32),
  ]
  # Mosaic wants all 128 lanes of a sum; they are equal.
  sums = (kv_heads, queries * share, LANES)
  tokens = pl.BlockSpec((queries, heads, h), lambda head, block, *_: (block, head, 0))
  out_specs, out_shape = [tokens], [jax.ShapeDtypeStruct(q.shape, q.dtype)]
  if has_sums:
    out_specs += [pl.BlockSpec(sums, lambda head, block, *_: (head, block, 0))] * 2
    out_shape += [jax.ShapeDtypeStruct((pairs // 2, x * share, LANES), jnp.float32)] * 2

    def run(*refs):
      *before, out, total, largest, buffers, semaphores, partial = refs
      body(*before, out, buffers, semaphores, total, largest, partial)
  else:
    scratch += [pltpu.VMEM(sums, jnp.float32)] * 2

    def run(*refs):
      *before, partial, total, largest = refs
      body(*before, total, largest, partial)

  results = pl.pallas_call(
    run,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=5,
      in_specs=[tokens, pl.BlockSpec(memory_space=pl.ANY)],
      out_specs=out_specs,
      grid=(n // heads, pl.cdiv(x, queries)),
      scratch_shapes=scratch,
    ),
    compiler_params=pltpu.CompilerParams(dimension_semantics=('arbitrary', 'arbitrary')),
    out_shape=out_shape,
    name='ragged_paged_attention',
    interpret=interpret,
  )(length, pages, start, jnp.zeros(2, jnp.int32), count, q, kv)
  if not has_sums:
    return results[0], None
  out, total, largest = results
  summed = largest[..., 0] + jnp.log(total[..., 0])  # [K, X · N / K]
  return out, summed.reshape(-1, x, share).swapaxes(0, 1).reshape(x, n)


def bytes_fetched(
  queries: Sequence[int],
  keys: Sequence[int],
  page_tokens: int,
  row_pages: int,
  token_bytes: int,
  together: int = BLOCK_QUERIES,
) -> int:
  """Return the bytes of keys and values that the kernel fetches in one layer.

  For each block of queries that has tokens of a sequence, it fetches the sequence's keys once, in
  blocks of whole pages.

  Args:
    queries: number of tokens of each sequence, in the order of the flat batch.
    keys: number of keys of each sequence.
    page_tokens: number of tokens of a page.
    row_pages: N, the largest number of pages of a row.
    token_bytes: size of a token's keys and values in the heads of this device.
    together: number of tokens that the kernel processes together.
  """
  block = page_tokens * block_pages(page_tokens, row_pages, token_bytes)
  fetched = start = 0
  rows = min(together, sum(queries))
  for tokens, length in zip(queries, keys, strict=True):
    times = (start + tokens - 1) // rows - start // rows + 1
    fetched += times * math.ceil(length / block) * block
    start += tokens
  return fetched * token_bytes


CACHED.register('ragged')(
  CacheAttention(
    init=init_pages,
    make_view=make_view,
    attend=attend_ragged,
    heads=HEADS,
    page_axis=1,
    layouts=(None,),
    max_blocks=1,
    takes_pages=takes_pages,
    platform='tpu',
    refuse=refuse,
  )
)
