"""The forward with a paged cache equals the forward of whole texts, wherever its pages are."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


@pytest.mark.parametrize('name', ['llama3', 'mistral', 'qwen2_windows'])
def test_cached_decode_equals_the_full_forward(load, name):
  """The prompt comes in two chunks, then token by token. Pages are in no order, and stale."""
  lm = load(name)
  full = np.asarray(lm.logits(TOKENS))
  rows = PagedRows(lm)
  for start in (0, 7):
    parts = [(row, start, start + 7) for row in range(B)]
    for row, logits in enumerate(rows.prefill(parts)):
      np.testing.assert_allclose(logits, full[row, start : start + 7], atol=1e-4, rtol=0)
  for at in range(14, T):
    logits = rows.decode(range(B), [at] * B)
    np.testing.assert_allclose(logits[:, 0], full[:, at], atol=1e-4, rtol=0)


@pytest.mark.parametrize('name', ['llama3', 'mistral', 'qwen2_windows'])
def test_rows_decode_several_tokens_at_once_beside_prefill(load, name):
  """Two rows continue with four tokens each, while a third is prefilled in the same step."""
  lm = load(name)
  full = np.asarray(lm.logits(TOKENS))
  rows = PagedRows(lm)
  rows.prefill([(0, 0, 9), (1, 0, 3)])
  decoded, (prefilled,) = rows.step([0, 1], [9, 3], [(2, 0, 13)], tokens=4)
  np.testing.assert_allclose(decoded[0], full[0, 9:13], atol=1e-4, rtol=0)
  np.testing.assert_allclose(decoded[1], full[1, 3:7], atol=1e-4, rtol=0)
  np.testing.assert_allclose(prefilled, full[2, :13], atol=1e-4, rtol=0)
  logits = rows.decode(range(B), [13, 7, 13])
  np.testing.assert_allclose(logits[:, 0], full[range(B), [13, 7, 13]], atol=1e-4, rtol=0)


def test_angles_are_computed_once_for_all_layers(load):
  """Without `compute_once`, XLA for CPUs computes the cosines again in each layer."""
  lm = load('llama3')
  for parts in ([], [(2, 0, 8)]):
    arguments = PagedRows(lm).arguments([0, 1], [0, 0], parts)[0]
    compiled = cached_forward.lower(*arguments).compile()
    assert compiled.as_text().count(' cosine(') == 1


def test_cached_rows_of_different_lengths_equal_the_full_forward(load):
  """Rows are prefilled together, and each continues at its own position."""
  lm = load('llama3')
  full = np.asarray(lm.logits(TOKENS))
  lengths = np.array([9, 4, 1])
  rows = PagedRows(lm)
  for row, logits in enumerate(rows.prefill([(row, 0, n) for row, n in enumerate(lengths)])):
    np.testing.assert_allclose(logits, full[row, : lengths[row]], atol=1e-4, rtol=0)
  for row, length in enumerate(lengths):  # nothing beyond a row's own tokens is written
    values = rows.values(row)
    assert not (values[:length] == STALE).any()
    np.testing.assert_array_equal(values[length:], STALE)
  for step in range(6):
    logits = rows.decode(range(B), lengths + step)
    np.testing.assert_allclose(logits[:, 0], full[range(B), lengths + step], atol=1e-4, rtol=0)


@pytest.mark.parametrize('name', [pytest.param('llama3', marks=pytest.mark.slow), 'mistral'])
def test_where_pages_are_changes_no_bit(load, name):
  """Neither their order, nor the number of blocks, nor further pages, nor what they hold."""
  lm = load(name)

  def decode(**options):
    rows = PagedRows(lm, **options)
    logits = [*rows.prefill([(0, 0, 9), (1, 0, 3), (2, 0, 17)]), *rows.prefill([(1, 3, 11)])]
    logits.append(rows.decode(range(B), [9, 11, 17]))
    logits.append(rows.step([0, 2], [10, 18], [(1, 12, 20)])[0])
    return [np.asarray(x) for x in logits]

  expected = decode()
  for options in ({'seed': 1}, {'blocks': 3}, {'spare': 9, 'blocks': 2}, {'stale': -7.0}):
    for ours, theirs in zip(decode(**options), expected, strict=True):
      np.testing.assert_array_equal(ours, theirs)


def test_other_rows_do_not_change_a_single_bit(load):
  """Here another row is longer, or starts with other tokens."""
  lm = load('llama3')
  results = []
  for length, shift in ((3, 0), (17, 0), (3, 1)):
    rows = PagedRows(lm)
    first = rows.prefill([(0, 0, 9), (1, 0, 6), (2, shift, shift + length)])[:2]
    results.append([*first, rows.decode(range(B), [9, 6, shift + length])[:2]])
  for result in results[1:]:
    for ours, theirs in zip(result, results[0], strict=True):
      np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize('name', ['mistral', 'qwen2_windows'])
def test_windowed_layers_need_only_the_pages_of_their_window(load, name):
  """Rows that gave their other pages back have the same bits as rows that did not."""
  lm = load(name)
  results = []
  for forget in (False, True):
    rows = PagedRows(lm, forget=forget)
    logits = [*rows.prefill([(0, 0, 12), (1, 0, 3)]), *rows.prefill([(0, 12, 18), (1, 3, 15)])]
    logits += [rows.decode([0, 1], [18 + step, 15 + step]) for step in range(5)]
    results.append(logits)
  for ours, theirs in zip(*results, strict=True):
    np.testing.assert_array_equal(ours, theirs)
  full = np.asarray(lm.logits(TOKENS))
  np.testing.assert_allclose(results[1][-1][:, 0], full[[0, 1], [22, 19]], atol=1e-4, rtol=0)


@pytest.mark.parametrize('name', [pytest.param('llama3', marks=pytest.mark.slow), 'mistral'])
def test_packed_tokens_of_several_rows_equal_separate_rows(load, name):
  """Rows differ in length and progress; one takes two pieces, and there is padding at the end."""
  lm = load(name)
  full = np.asarray(lm.logits(TOKENS))
  rows = PagedRows(lm, rows=4)
  calls = [[(2, 0, 11), (0, 0, 3)], [(0, 3, 9), (3, 0, 7)], [(2, 11, T), (3, 7, T), (0, 9, T)]]
  for parts in calls:
    for (row, a, b), logits in zip(parts, rows.prefill(parts), strict=True):
      np.testing.assert_allclose(logits, full[row % B, a:b], atol=1e-4, rtol=0)
  np.testing.assert_array_equal(rows.values(1), STALE)  # row 1 had no token


@pytest.mark.parametrize('dtype', ['bfloat16', pytest.param('float16', marks=pytest.mark.slow)])
def test_half_precision_decode_equals_the_full_forward(load, dtype):
  """XLA for CPUs does not support some half-precision products with one query per row."""
  lm = dataclasses.replace(load('llama3'), dtype=dtype)
  exact = np.asarray(load('llama3').logits(TOKENS))[:, -1]
  full = np.asarray(lm.logits(TOKENS))[:, -1]
  rows = PagedRows(lm, dtype=jnp.dtype(dtype))
  rows.prefill([(row, 0, T - 1) for row in range(2)])
  rows.prefill([(2, 0, T - 1)])
  logits = np.asarray(rows.decode(range(B), [T - 1] * B))[:, 0]
  # Both round at other places, so they are compared by their distance from the exact logits.
  error, expected = (np.sqrt(np.mean((x - exact) ** 2)) for x in (logits, full))
  print(dtype, error, expected, exact.std())
  assert error < 1.25 * expected < 0.05 * exact.std()
