"""Rows in a paged cache, whose tables are built by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cai_jax.model import cache as cache_lib
from cai_jax.model.cached_forward import ForwardSpec, forward_cached, hidden_logits
from cai_jax.runtime.mesh import batch_sharding

B, T = 3, 24
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(3, 300, (B, T))
PAGE, WIDTH, STALE = 4, 8, 3.0  # tokens of a page and of a piece; contents of unused pages


@functools.partial(jax.jit, static_argnums=0)
def cached_forward(spec, params, tokens, positions, cache, step):
  hidden, cache, _ = forward_cached(spec, params, tokens, positions, cache, step)
  return hidden_logits(spec.config, params, hidden), cache


class PagedRows:
  """Rows of TOKENS in a paged cache, whose tables are built here by hand.

  Each row has pages for T tokens, anywhere in the pool. All pages begin with stale contents.

  Args:
    lm: the model.
    rows: number of rows.
    blocks: number of blocks.
    spare: number of pages that no row owns.
    seed: decides where the pages are.
    stale: value of all entries at the beginning.
    forget: whether windowed layers drop the pages that no later token sees.
    dtype: dtype of the cache.
  """

  def __init__(
    self, lm, rows=B, blocks=1, spare=2, seed=0, stale=STALE, forget=False, dtype=jnp.float32
  ):
    self.lm, self.forget = lm, forget
    each = T // PAGE
    self.total = rows * each + spare
    order = np.random.default_rng(seed).permutation(self.total)
    self.pages = order[: rows * each].reshape(rows, each).astype(np.int32)
    ends = np.linspace(0, self.total, blocks + 1).astype(int)
    fill = lambda block: jax.tree.map(lambda x: x + jnp.asarray(stale, x.dtype), block)  # noqa: E731

    def make_blocks(kind):
      if kind.delta:
        return (fill(cache_lib.init_states(kind.delta, self.total, dtype)),)
      heads, sizes = (kind.kv_heads, kind.head_dim), np.diff(ends).tolist()
      return tuple(fill(cache_lib.init_block(*heads, n, PAGE, dtype)) for n in sizes)

    self.cache = tuple(map(make_blocks, lm.config.kinds))

  def values(self, row):
    """Return the values [T,K,H] that the first layer holds for a row."""
    pages = np.concatenate([np.asarray(block.v) for block in self.cache[0]])[self.pages[row]]
    return pages.transpose(0, 2, 1, 3).reshape(T, *pages.shape[1::2])

  def row_pages(self, row, first_token, last_token, window):
    """Return a row's pages for its next tokens, padded at the end, and how many it dropped."""
    dropped = 0
    if self.forget and window is not None:
      dropped = max(first_token - window + 1, 0) // PAGE
    live = self.pages[row, dropped : last_token // PAGE + 1]
    pages = np.full(self.pages.shape[1], self.total, np.int32)
    pages[: len(live)] = live
    return pages, dropped

  def row_table(self, rows, starts, tokens, window):
    owner, start = np.full((1, self.total), -1, np.int32), np.zeros((1, self.total), np.int32)
    pages, first = [], []
    for index, (row, at) in enumerate(zip(rows, starts, strict=True)):
      own, dropped = self.row_pages(row, at, at + tokens - 1, window)
      live = own[own < self.total]
      owner[0, live] = index
      start[0, live] = PAGE * (dropped + np.arange(len(live)))
      pages.append(own)
      first.append(PAGE * dropped)
    return cache_lib.RowTable(owner, start, np.array([pages]), np.array([first], np.int32))

  def pieces(self, parts, size):
    """Return the `Pieces` of parts (row, first token, end), which follow each other."""
    cuts, at = [], 0  # (index of the piece's first token, row, its first token, its end)
    for row, a, b in parts:
      cuts += [(at + c - a, row, c, min(c + WIDTH, b)) for c in range(a, b, WIDTH)]
      at += b - a
    count = size // WIDTH + len(parts)
    start = np.zeros((1, count), np.int32)
    start[0, : len(cuts)] = [cut[0] for cut in cuts]
    tables = []
    for window in cache_lib.windows_of(self.lm.config):
      page, offset = np.full((1, size), self.total, np.int32), np.zeros((1, size), np.int32)
      pages = np.zeros((1, count, self.pages.shape[1]), np.int32)
      number, first = np.zeros((1, count), np.int32), np.zeros((1, count), np.int32)
      for piece, (begin, row, a, b) in enumerate(cuts):
        pages[0, piece], dropped = self.row_pages(row, a, b - 1, window)
        number[0, piece] = (b - 1) // PAGE + 1 - dropped
        first[0, piece] = dropped * PAGE
        number_of_page = np.arange(a, b) // PAGE if window != 0 else 0  # a state has one page
        page[0, begin : begin + b - a] = self.pages[row, number_of_page]
        offset[0, begin : begin + b - a] = np.arange(a, b) % PAGE
      tables.append(cache_lib.PieceTable(page, offset, pages, number, first))
    return cache_lib.Pieces(start, np.array([len(cuts)], np.int32), tuple(tables))

  def arguments(self, rows, starts, parts, tokens=1, size=48):
    """Return the arguments of `cached_forward` for a step, and which parts of X they fill."""
    windows, decoded = cache_lib.windows_of(self.lm.config), []
    parts = [(row, a, b) for row, a, b in parts]
    for row, at in zip(rows, starts, strict=True):
      decoded += [(row, at + i) for i in range(tokens)]
    flat = decoded + [(row, i) for row, a, b in parts for i in range(a, b)]
    padding = len(decoded) + (size if parts else 0) - len(flat)
    ids = [TOKENS[row % B, at] for row, at in flat] + [0] * padding
    positions = [at for _, at in flat] + [-1] * padding
    tables = tuple(self.row_table(rows, starts, tokens, window) for window in windows)
    step = cache_lib.Step(tables if len(rows) else (), self.pieces(parts, size) if parts else None)
    lm, sharding = self.lm, batch_sharding(self.lm.mesh)
    arrays = np.array([ids], np.int32), np.array([positions], np.int32)
    spec = ForwardSpec(lm.config, lm.dtype, sharding, WIDTH)
    return (spec, lm.params, *arrays, self.cache, step), len(decoded)

  def step(self, rows, starts, parts, tokens=1):
    """Return the logits [D,W,V] of decoded rows, and those of each prefilled part."""
    arguments, decoded = self.arguments(rows, starts, parts, tokens)
    logits, self.cache = cached_forward(*arguments)
    ends = decoded + np.cumsum([b - a for _, a, b in parts], dtype=int)
    prefilled = [logits[0, end - (b - a) : end] for (_, a, b), end in zip(parts, ends, strict=True)]
    return logits[0, :decoded].reshape(len(rows), tokens, logits.shape[-1]), prefilled

  def prefill(self, parts):
    return self.step([], [], parts)[1]

  def decode(self, rows, starts):
    return self.step(rows, starts, [])[0]
