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
from jax.sharding import Mesh

from cai_jax.model.attention.cached import CACHED, CacheAttention, attend_by_shard
from cai_jax.model.attention.mask import MASKED
from cai_jax.model.attention.paged import find_places, merge_prefixes, prefix_masks
from cai_jax.model.attention.pieces import PieceView, join_pieces, split_pieces, view_pieces
from cai_jax.model.attention.scores import Scores
from cai_jax.model.attention.softmax import PartialSoftmax, group_queries, merge, ungroup_queries
from cai_jax.model.cache import LayerCache, Prefixes, Step
from cai_jax.model.config import ModelConfig

try:
  from jax.experimental.pallas import triton as plgpu
except ImportError:  # jax 0.12 announces that a later version will be without it
  plgpu = None  # type: ignore[assignment]

HEADS = 1  # axis of the pages that counts heads
LEAST = 16  # rows, columns and depth of a matrix product of the tensor cores
LEAST_CAPABILITY = 8.0  # Ampere, the first for which XLA compiles Triton's kernels
# Queries that a program takes together: those of a decoded row fit into the least product, and
# a piece of prefill reads its pages once for each of its blocks.
PREFILL_BLOCK = 64
# Most bytes of such a block, of a page's keys of one head, and of such keys that are fetched while
# others are multiplied. So a program with pages of 64 tokens needs less than 99 KiB of shared
# memory, which all GPUs since Ampere have.
BLOCK_BYTES, PAGE_BYTES, AHEAD_BYTES = 2**14, 2**16, 2**15
# A decoded row's pages are read in parts of so many, by programs of their own, whose softmaxes are
# merged. So a long row does not take longer than the others. The number is the same for
# every batch, so that the bits of a row are, too.
SPLIT_PAGES = 16


class TritonPages(NamedTuple):
  """Pages of one layer.

  Attributes:
    kv: [B,2K,S,H]; B counts pages and S the tokens of a page. The keys and the values of a head are
      next to each other: k of head 0, v of head 0, k of head 1 and so on.
  """

  kv: jax.Array


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


def init_pages(heads: int, head_dim: int, pages: int, size: int, dtype) -> TritonPages:
  """Return pages of zeros for one layer; see `cached.Init`."""
  return TritonPages(jnp.zeros((pages, 2 * heads, size, head_dim), dtype))


def refuse(config: ModelConfig, dtype: str, page_tokens: int, mesh: Mesh) -> str | None:
  """Return why the kernel does not support a model, or None; see `cached.CacheAttention`."""
  if plgpu is None:
    return f"needs Pallas's Triton backend, which jax {jax.__version__} does not have."
  device = mesh.devices.flat[0]
  if device.platform == 'gpu' and not compiles_for(device):
    return (
      f'needs an NVIDIA GPU with a compute capability of {LEAST_CAPABILITY} or more, and this is '
      f'{device.device_kind}.'
    )
  if not fits(page_tokens):
    return f'needs pages of 16, 32, 64 … tokens, not engine.page_tokens={page_tokens}.'
  for head_dim in dict.fromkeys(kind.head_dim for kind in config.kinds):
    if not fits(head_dim):
      return f'needs heads of 16, 32, 64 … numbers, and the model has {head_dim}.'
    most = PAGE_BYTES // (head_dim * jnp.dtype(dtype).itemsize)
    if page_tokens > most:
      return (
        f'needs pages of at most {most} tokens for heads of {head_dim} numbers in {dtype}, not '
        f'engine.page_tokens={page_tokens}.'
      )
  return None


def compiles_for(gpu: jax.Device) -> bool:
  """Return whether XLA compiles Triton's kernels for a GPU."""
  capability = str(gpu.compute_capability)  # of AMD's, a name such as 'gfx942'
  return capability[0].isdigit() and float(capability) >= LEAST_CAPABILITY


def choose_block(rows: int, page_tokens: int, head_bytes: int) -> tuple[int, int]:
  """Return how many queries a program takes together, and the stages in which it fetches pages.

  Args:
    rows: R.
    page_tokens: S.
    head_bytes: size of a key of one head.
  """
  most = min(PREFILL_BLOCK, max(LEAST, BLOCK_BYTES // head_bytes))
  block = min(most, max(LEAST, pl.next_power_of_2(rows)))
  return block, 3 if page_tokens * head_bytes <= AHEAD_BYTES else 1


def fits(size: int) -> bool:
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
  place, offset, decoded = find_places(positions, step, index, page, total)
  rows = pieces = None
  if step.rows:
    table = step.rows[index]
    at = positions[:, :decoded].reshape(*table.first.shape, -1)
    rows = RowSequences(at, table.pages, table.first)
  if step.pieces is not None:
    pieces = view_pieces(positions[:, decoded:], step.pieces, index)
  return TritonView(place, offset, rows, pieces, prefix_masks(positions, prefixes, window))


def attend_triton(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  blocks: tuple[TritonPages, ...],
  prefixes: Sequence[LayerCache],
  view: TritonView,
  window: int | None,
  width: int,
  mesh: Mesh,
  scores: Scores,
  sinks: jax.Array | None = None,
) -> tuple[jax.Array, tuple[TritonPages, ...]]:
  """Write a step's keys and values to a layer's cache, and attend to it; see `cached.Attend`."""
  interpret = mesh.devices.flat[0].platform != 'gpu'
  local = functools.partial(
    _attend_local, window=window, width=width, interpret=interpret, scores=scores
  )
  return attend_by_shard(local, HEADS, mesh, q, k, v, blocks, tuple(prefixes), view, sinks)


def _attend_local(q, k, v, blocks, prefixes, view, sinks, window, width, interpret, scores):
  """Compute `attend_triton` for one batch shard, whose axis G has the length 1."""
  q, k, v = q[0], k[0], v[0]
  view = jax.tree.map(lambda x: x[0], view)
  (block,) = blocks
  new = jnp.stack([k, v], 2).reshape(len(k), -1, k.shape[-1])  # [X,2K,H]
  kv = block.kv.at[view.page, :, view.offset].set(new.astype(block.kv.dtype), mode='drop')
  (x, n, h), kv_heads, outputs, decoded = q.shape, k.shape[1], [], 0
  is_partial = bool(prefixes) or sinks is not None
  options = window, scores, is_partial, interpret
  if view.rows is not None:
    rows, tokens = view.rows.positions.shape
    decoded = rows * tokens
    queries = group_queries(q[:decoded].reshape(rows, tokens, n, h), kv_heads)
    read = read_sequences(queries, kv, *view.rows, *options)
    ungroup = lambda x: ungroup_queries(x, tokens).reshape(decoded, n, -1)  # noqa: E731
    outputs.append(jax.tree.map(ungroup, read))
  if view.pieces is not None:
    queries, positions, target = split_pieces(q[decoded:], view.pieces, width)
    # No key has a place for the queries beyond a piece, so the kernel reads no page for them.
    positions = jnp.where(target < x - decoded, positions, -1)
    tables = positions, view.pieces.pages, view.pieces.first
    read = read_sequences(group_queries(queries, kv_heads), kv, *tables, *options)
    outputs.append(join_pieces(read, target, x - decoded))
  own = jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)
  if not isinstance(own, PartialSoftmax):
    return own[None], (TritonPages(kv),)
  out = merge_prefixes(own, q, kv_heads, prefixes, view.prefix_masks, scores, sinks)
  return out, (TritonPages(kv),)


def read_sequences(
  queries: jax.Array,
  kv: jax.Array,
  positions: jax.Array,
  pages: jax.Array,
  first: jax.Array,
  window: int | None,
  scores: Scores,
  is_partial: bool,
  interpret: bool,
) -> jax.Array | PartialSoftmax:
  """Return the attention of sequences to their pages: the output [Q,K,R,H], or a PartialSoftmax.

  Args:
    queries: [Q,K,R,H], rotated; T queries for each of several heads, with T the faster axis.
    kv: [B,2K,S,H], as in `TritonPages`.
    positions: i32[Q,T], of the queries; negative for padding, which attends to nothing.
    pages: i32[Q,N], the pages of each sequence in order; those after its last one may be anything.
    first: i32[Q], position of the first token of the first page.
    window: number of tokens that a query sees, itself included; None means no limit.
    scores: scale and cap of the scores.
    is_partial: whether to return a softmax [Q,K,R,...], to which further keys can be added. The
      output is in the dtype of the queries, and 0 for padding.
    interpret: whether to run in Pallas's interpreter.
  """
  count, kv_heads, rows, h = queries.shape
  block, stages = choose_block(rows, kv.shape[2], h * kv.dtype.itemsize)
  # A piece of prefill has several programs already, and parts of it would take much memory.
  splits = 1 if rows > block else pl.cdiv(pages.shape[1], SPLIT_PAGES)
  is_split = is_partial or splits > 1
  pages = jnp.clip(pages, 0, len(kv) - 1)
  whole = lambda shape: pl.BlockSpec(shape, lambda *_: (0,) * len(shape))  # noqa: E731
  args = queries.astype(kv.dtype), positions, pages, first, kv
  shapes = [jax.ShapeDtypeStruct(queries.shape, queries.dtype)]
  if is_split:
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    row_shape = splits, count, kv_heads, rows
    shapes = [f32((*row_shape, h)), f32(row_shape), f32(row_shape)]
  results = pl.pallas_call(
    functools.partial(_kernel, block=block, splits=splits, window=window, scores=scores),
    grid=(count, kv_heads, splits * pl.cdiv(rows, block)),
    in_specs=[whole(x.shape) for x in args],
    out_specs=[whole(x.shape) for x in shapes],
    out_shape=shapes,
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=stages),
    interpret=interpret,
    name='paged_attention',
  )(*args)
  if not is_split:
    return results[0]
  out, largest, total = results
  softmax = merge(
    [PartialSoftmax(largest[i, ..., None], total[i, ..., None], out[i]) for i in range(splits)]
  )
  return softmax if is_partial else softmax.divided().astype(queries.dtype)


def _kernel(q_ref, at_ref, pages_ref, first_ref, kv_ref, *out_refs, block, splits, window, scores):
  """Compute the softmax of one block of queries over one part of the sequence's pages.

  Args:
    q_ref: [Q,K,R,H].
    at_ref: i32[Q,T], positions of the queries; negative for padding.
    pages_ref: i32[Q,N].
    first_ref: i32[Q].
    kv_ref: [B,2K,S,H].
    *out_refs: the output [Q,K,R,H]; or f32[splits,Q,K,R,H], the sum of the values weighted by
      exp(score - max), f32[splits,Q,K,R], the largest score, and the same of the sum of weights.
    block: number of queries that a program takes together; those beyond R are padding.
    splits: number of parts of a sequence's pages.
    window: number of tokens that a query sees, itself included; None means no limit.
    scores: scale and cap of the scores.
  """
  sequence, head, index = (pl.program_id(i) for i in range(3))
  split, (rows, h), size = index % splits, q_ref.shape[2:], kv_ref.shape[2]
  row = index // splits * block + jnp.arange(block)
  is_row = row < rows
  at = at_ref.at[sequence, row % at_ref.shape[1]]
  at = plgpu.load(at, mask=is_row, other=-1)
  is_entry = jnp.broadcast_to(is_row[:, None], (block, h))
  entry = row[:, None], jnp.arange(h)[None, :]  # Pallas's interpreter supports no slices here
  q = plgpu.load(q_ref.at[sequence, head, *entry], mask=is_entry, other=0)
  first = first_ref[sequence]
  precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
  product = functools.partial(jnp.dot, precision=precision, preferred_element_type=jnp.float32)

  def add_page(number, state):
    largest, total, out = state
    page = pages_ref[sequence, number]
    distance = at[:, None] - (first + number * size + jnp.arange(size))[None, :]
    mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    score = scores.of_products(product(q, kv_ref[page, 2 * head].T), h)
    score = jnp.where(mask, score, MASKED)
    new = jnp.maximum(largest, score.max(1))
    weights = jnp.where(mask, jnp.exp(score - new[:, None]), 0.0)
    scale = jnp.exp(largest - new)
    values = kv_ref[page, 2 * head + 1]
    out = out * scale[:, None] + product(weights.astype(values.dtype), values)
    return new, total * scale + weights.sum(1), out

  empty = (
    jnp.full(block, MASKED, jnp.float32),
    jnp.zeros(block, jnp.float32),
    jnp.zeros((block, h), jnp.float32),
  )
  last = at.max()
  end = jnp.where(last < 0, 0, (last - first) // size + 1)
  start = split * SPLIT_PAGES
  if splits > 1:
    end = jnp.minimum(end, start + SPLIT_PAGES)
  largest, total, out = jax.lax.fori_loop(start, end, add_page, empty)
  if len(out_refs) == 1:
    out /= jnp.where(total > 0, total, 1.0)[:, None]
    target = out_refs[0].at[sequence, head, *entry]
    plgpu.store(target, out.astype(out_refs[0].dtype), mask=is_entry)
    return
  out_ref, max_ref, sum_ref = out_refs
  at = split, sequence, head
  plgpu.store(out_ref.at[*at, *entry], out, mask=is_entry)
  plgpu.store(max_ref.at[*at, row], largest, mask=is_row)
  plgpu.store(sum_ref.at[*at, row], total, mask=is_row)


CACHED.register('triton')(
  CacheAttention(
    init=init_pages,
    make_view=make_view,
    attend=attend_triton,
    heads=HEADS,
    page_axis=2,
    layouts=(None,),
    max_blocks=1,
    takes_pages=fits,
    platform='gpu',
    refuse=refuse,
  )
)
