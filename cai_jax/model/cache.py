"""The paged cache of keys and values, and the tables that say where a step's tokens are in it.

The cache of a layer is a pool of pages. A row (one sequence) owns any pages of it;
its tokens are in order, so its j-th page holds its tokens from j · S on. The pool is
split into blocks: separate arrays that the engine allocates as it needs them, and of which a
program gets only those that are in use. Every program reads all pages that it gets, in place.

A layer without attention keeps a state in place of tokens. It has the window 0 (see
`ModelConfig.window`), and a row owns one of its pages, which holds all that the layer keeps.

`cai_jax.model.transformer` defines the axis letters. Further axes: G batch shards of the mesh (each
with its own rows and pages), W tokens per decoded row, C tokens of a piece of prefill.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cai_jax.model.config import DeltaRule, ModelConfig


class LayerCache(NamedTuple):
  """Keys and values of the pages of one block of a layer, or of one shared prefix.

  Keys are stored transposed, so that both products of a decode step read memory in order.

  Attributes:
    k: [B,K,H,S], rotated; B counts pages and S the tokens of a page.
    v: [B,K,S,H].
  """

  k: jax.Array
  v: jax.Array


class StateCache(NamedTuple):
  """The pages of a layer with a gated delta rule.

  B counts pages. The other letters are those of `cai_jax.model.delta_rule`.

  Attributes:
    state: f32[B,K,G,H,U].
    q: [B,W-1,K,H], the last inputs of the convolution of queries.
    k: [B,W-1,K,H], those of keys.
    v: [B,W-1,K,G,U], those of values.
  """

  state: jax.Array
  q: jax.Array
  k: jax.Array
  v: jax.Array


Cache = tuple[tuple[LayerCache | StateCache, ...], ...]  # for each layer, its blocks


class Prefix(NamedTuple):
  """A sequence of tokens with which many rows begin, cached once for all of them.

  Attributes:
    cache: for each layer, one page (B = 1) that is long enough for all tokens, or holds the state
      after them.
    length: i32[], number of tokens; the rest of the page is padding.
  """

  cache: tuple[LayerCache | StateCache, ...]
  length: jax.Array


class Prefixes(NamedTuple):
  """The available prefixes, and the choice of one for each token.

  Attributes:
    entries: the prefixes.
    choice: i32[G,T]: index into `entries` of the prefix that a token's row begins with; -1 means
      none.
  """

  entries: tuple[Prefix, ...]
  choice: jax.Array


class RowTable(NamedTuple):
  """The pages of the rows that are decoded.

  Attributes:
    owner: i32[G,P], for each page that the program gets, the row that owns it; -1 if none.
    start: i32[G,P], position of the page's first token.
    pages: i32[G,D,N], the pages of each of D rows in order; P marks the end.
    first: i32[G,D], position of the first token of the row's first page.
  """

  owner: jax.Array
  start: jax.Array
  pages: jax.Array
  first: jax.Array


class PieceTable(NamedTuple):
  """The pages that pieces of prefilled tokens read and write.

  Attributes:
    page: i32[G,T], the page to which each token is written; P drops the write.
    offset: i32[G,T], its place in the page.
    pages: i32[G,R,N], the pages that each of R pieces reads, in order.
    num_pages: i32[G,R], number of those pages.
    first: i32[G,R], position of the first token of the piece's first page.
  """

  page: jax.Array
  offset: jax.Array
  pages: jax.Array
  num_pages: jax.Array
  first: jax.Array


class Pieces(NamedTuple):
  """Prefilled tokens, split into pieces: up to C consecutive tokens of one row.

  Attributes:
    start: i32[G,R], index of the piece's first token among the prefilled tokens.
    number: i32[G], number of pieces.
    tables: for each window that layers have, the pages.
  """

  start: jax.Array
  number: jax.Array
  tables: tuple[PieceTable, ...]


class Step(NamedTuple):
  """Where the tokens of a step are in the cache.

  A step has D · W tokens of D rows that are decoded, W for each, and then prefilled tokens.

  Attributes:
    rows: for each window that layers have, the pages of the decoded rows; empty if there are none.
    pieces: the prefilled tokens, or None.
  """

  rows: tuple[RowTable, ...]
  pieces: Pieces | None


def windows_of(config: ModelConfig) -> tuple[int | None, ...]:
  """Return the different windows of a model's layers, in order of their first layer.

  Layers with the same window keep the same tokens, so they share tables.

  Args:
    config: the shape of the model.
  """
  return tuple(dict.fromkeys(config.window(layer) for layer in range(config.num_layers)))


def init_block(heads: int, head_dim: int, pages: int, size: int, dtype) -> LayerCache:
  """Return pages of zeros for one layer.

  Args:
    heads: number of key and value heads.
    head_dim: channels per head.
    pages: number of pages.
    size: number of tokens of a page.
    dtype: dtype of the keys and values.
  """
  k = (pages, heads, head_dim, size)
  v = (pages, heads, size, head_dim)
  return LayerCache(jnp.zeros(k, dtype), jnp.zeros(v, dtype))


def init_states(delta: DeltaRule, pages: int, dtype) -> StateCache:
  """Return pages of zeros for one layer with a gated delta rule.

  Args:
    delta: number and size of the heads.
    pages: number of pages.
    dtype: dtype of the inputs of convolutions.
  """
  groups = delta.value_heads // delta.key_heads
  keys = (pages, delta.width - 1, delta.key_heads, delta.key_dim)
  values = (pages, delta.width - 1, delta.key_heads, groups, delta.value_dim)
  state = (pages, delta.key_heads, groups, delta.key_dim, delta.value_dim)
  inputs = (jnp.zeros(shape, dtype) for shape in (keys, keys, values))
  return StateCache(jnp.zeros(state, jnp.float32), *inputs)
