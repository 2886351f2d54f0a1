"""JAX's ragged paged attention, run in Pallas's interpreter, agrees with the attention 'pages'."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import literals
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

from cai_jax.model.attention import ragged, triton
from cai_jax.model.attention.cached import CACHED, choose_cached
from cai_jax.model.attention.scores import PLAIN, Scores
from cai_jax.model.cache import (
  LayerCache,
  Pieces,
  PieceTable,
  Prefix,
  Prefixes,
  RowTable,
  Step,
)
from cai_jax.model.config import ModelConfig
from cai_jax.model.families.family import config_from_hf
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import make_mesh
from tests.test_kernels import A100, AMD, T4

pytestmark = pytest.mark.usefixtures('full_optimization')

HEADS, KV_HEADS, H, PAGE, N, PAGES = 4, 2, 128, 16, 3, 12
WIDTH, CHUNK = 8, 24  # tokens of a piece, and of a chunk
SHARED = 21  # tokens of the shared prefix that row 2 begins with
ROW_PAGES = np.array([[4, 1, 0], [7, 2, 9], [3, 11, 5]])
SHAPE = {
  'model_type': 'llama',
  'vocab_size': 64,
  'hidden_size': HEADS * H,
  'intermediate_size': 64,
  'num_hidden_layers': 2,
  'num_attention_heads': HEADS,
  'num_key_value_heads': KV_HEADS,
  'max_position_embeddings': 256,
}


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
  """Let the interpreter run the kernel, which stores to a scalar at a constant index.

  In jax 0.10.2 and 0.12.0, its rule for stores asks such an index for its shape (`_swap_discharge_
  rule`), which the type of constants does not have.
  """
  monkeypatch.setattr(literals.TypedInt, 'shape', (), raising=False)


def config(**changes) -> ModelConfig:
  return config_from_hf(SHAPE | changes)


def draw(seed: int, *shape: int) -> jax.Array:
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def row_table(rows: dict[int, int], base: np.ndarray) -> RowTable:
  """Return the table of all three rows; the pages of rows in `rows` hold so many tokens."""
  owner, start = np.full((1, PAGES), -1), np.zeros((1, PAGES))
  pages = np.full((1, 3, N), PAGES)
  for row, tokens in rows.items():
    for i in range(-(-tokens // PAGE)):
      page = pages[0, row, i] = ROW_PAGES[row, i]
      owner[0, page], start[0, page] = row, base[row] + PAGE * i
  return RowTable(*(jnp.asarray(x, jnp.int32) for x in (owner, start, pages, base[None])))


def pieces_of(segments: list[tuple[int, int, int]], base: np.ndarray) -> tuple[np.ndarray, Pieces]:
  """Return positions [1,CHUNK] and pieces of segments (row, first, last + 1) of own tokens."""
  at, page, offset = np.full((1, CHUNK), -1), np.full((1, CHUNK), 99), np.zeros((1, CHUNK))
  count = CHUNK // WIDTH + 3
  starts, pages = np.zeros((1, count)), np.zeros((1, count, N))
  counts, first = np.zeros((1, count)), np.zeros((1, count))
  used = end = 0
  for row, low, high in segments:
    own = np.arange(low, high)
    place = slice(end, end + len(own))
    at[0, place], offset[0, place] = base[row] + own, own % PAGE
    page[0, place] = ROW_PAGES[row, own // PAGE]
    for begin in range(low, high, WIDTH):
      starts[0, used], pages[0, used], first[0, used] = end + begin - low, ROW_PAGES[row], base[row]
      counts[0, used] = (min(begin + WIDTH, high) - 1) // PAGE + 1
      used += 1
    end += len(own)
  i32 = functools.partial(jnp.asarray, dtype=jnp.int32)
  table = PieceTable(*map(i32, (page, offset, pages, counts, first)))
  return at, Pieces(i32(starts), i32([used]), (table,))


def attend_both(kernel, window, has_prefix, rows, decoded, segments, scores, sinks=None):
  """Return outputs at real tokens [n,N,H] and updated pages, by a kernel and by 'pages'.

  Args:
    kernel: the name of an attention to the cache.
    window: the layer's window.
    has_prefix: whether row 2 begins with a shared prefix.
    rows: own tokens of each row that takes part, with the one that is decoded.
    decoded: the rows of these that are not idle.
    segments: the prefilled tokens; see `pieces_of`.
    scores: scale and cap of the scores.
    sinks: f32[N], or None.
  """
  mesh, base = make_mesh(1, devices=jax.devices()[:1]), np.array([0, 0, SHARED * has_prefix])
  parts = [np.array([[base[r] + rows[r] - 1 if r in decoded else -1 for r in range(3)]])]
  row_of, pieces = [0, 1, 2], None
  if segments:
    at, pieces = pieces_of(segments, base)
    parts.append(at)
    row_of += [r for r, low, high in segments for _ in range(low, high)]
    row_of += [0] * (3 + CHUNK - len(row_of))
  positions = jnp.asarray(np.concatenate(parts, 1), jnp.int32)
  shared = LayerCache(draw(7, 1, KV_HEADS, H, 32), draw(8, 1, KV_HEADS, 32, H))
  entries = (Prefix((shared,), jnp.array(SHARED)),) if has_prefix else ()
  choice = jnp.asarray([[0 if r == 2 else -1 for r in row_of]])
  step, x = Step((row_table(rows, base),), pieces), positions.shape[1]
  q, k, v = (draw(i, 1, x, n, H) for i, n in enumerate((HEADS, KV_HEADS, KV_HEADS)))
  keys, values = (draw(i, PAGES, PAGE, KV_HEADS, H) for i in (5, 6))
  pages = LayerCache(keys.transpose(0, 2, 3, 1), values.transpose(0, 2, 1, 3))

  def run(name, block):
    entry, prefixes = CACHED[name], Prefixes(entries, choice)
    view = entry.make_view(positions, step, 0, prefixes, [PAGES], PAGE, window)
    layers = [p.cache[0] for p in entries]
    args = q, k, v, (block,), layers, view, window, WIDTH, mesh, scores, sinks
    out, blocks = entry.attend(*args)
    return np.asarray(out)[np.asarray(positions) >= 0], blocks[0]

  ours, written = run(kernel, stacked(kernel, pages))
  theirs, expected = run('pages', pages)
  return (ours, written), (theirs, stacked(kernel, expected))


def stacked(kernel: str, pages: LayerCache) -> ragged.RaggedPages | triton.TritonPages:
  """Return pages as a kernel stores them."""
  both = jnp.stack([pages.k.swapaxes(2, 3), pages.v], 2)  # [B,K,2,S,H]
  both = both.reshape(PAGES, 2 * KV_HEADS, PAGE, H)
  if kernel == 'triton':
    return triton.TritonPages(both)
  return ragged.RaggedPages(both.swapaxes(1, 2))


@pytest.mark.parametrize('kernel', ['ragged', 'triton'])
@pytest.mark.parametrize('scores', [pytest.param(PLAIN, marks=pytest.mark.slow), Scores(0.3, 1.5)])
@pytest.mark.parametrize(
  ('window', 'has_prefix', 'rows', 'decoded', 'segments'),
  [
    # One row is decoded, one is idle, and two pieces of the third are prefilled.
    (None, True, {0: 6, 1: 34}, [1], [(2, 4, 17)]),
    (13, True, {0: 6, 1: 19}, [0, 1], [(2, 0, 9)]),
    (13, False, {0: 6, 1: 34, 2: 10}, [1, 2], []),  # decodes, and row 0 is idle
  ],
)
def test_a_kernel_agrees_with_pages(kernel, window, has_prefix, rows, decoded, segments, scores):
  """Two query heads share a key-value head, and rows have up to three pages in any order."""
  (ours, written), (theirs, expected) = attend_both(
    kernel, window, has_prefix, rows, decoded, segments, scores
  )
  np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)
  jax.tree.map(np.testing.assert_array_equal, written, expected)
  assert theirs.std() > 0.1


@pytest.mark.parametrize('has_prefix', [False, True])
def test_parts_of_a_row_make_the_whole(monkeypatch, has_prefix):
  """Rows of three pages, read in parts of two, by blocks of half of a piece's queries."""
  monkeypatch.setattr(triton, 'SPLIT_PAGES', 2)
  monkeypatch.setattr(triton, 'LEAST', 8)
  monkeypatch.setattr(triton, 'PREFILL_BLOCK', 8)
  case = 'triton', None, has_prefix, {0: 6, 1: 34}, [0, 1], [(2, 4, 21)], Scores(0.3, 1.5)
  (ours, _), (theirs, _) = attend_both(*case)
  np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize('kernel', ['ragged', 'triton'])
@pytest.mark.parametrize('has_prefix', [pytest.param(False, marks=pytest.mark.slow), True])
def test_sinks_give_the_same_as_with_pages(kernel, has_prefix):
  case = kernel, None, has_prefix, {0: 6, 1: 34}, [1], [(2, 4, 17)], PLAIN
  (ours, _), (theirs, _) = attend_both(*case, sinks=jnp.array([3.0, -1.0, 0.5, 2.0]))
  np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)
  assert np.abs(theirs - attend_both(*case)[1][0]).max() > 0.1


def test_the_sums_are_those_of_a_softmax():
  """The kernel's sums, which JAX's own function does not return, against a direct computation."""
  q, kv = draw(0, 5, HEADS, H), draw(1, PAGES, PAGE, 2 * KV_HEADS, H)
  length, pages = jnp.array([19, 3]), jnp.asarray(ROW_PAGES[:2], jnp.int32)
  start = jnp.array([0, 3, 5])  # three queries of a row of 19 keys, and two of a row of 3
  args = (jnp.asarray(x, jnp.int32) for x in (length, pages, start, [2]))
  out, summed = ragged.call_kernel(q, kv, *args, 32, None, True, True)
  for token, (row, seen) in enumerate([(0, 17), (0, 18), (0, 19), (1, 2), (1, 3)]):
    keys, values = (
      np.asarray(kv)[ROW_PAGES[row], :, i::2].reshape(-1, KV_HEADS, H) for i in (0, 1)
    )
    for head in range(HEADS):
      scores = keys[:seen, head // 2] @ np.asarray(q)[token, head] * H**-0.5
      weights = np.exp(scores)
      np.testing.assert_allclose(summed[token, head], np.log(weights.sum()), atol=1e-5)
      direct = weights @ values[:seen, head // 2] / weights.sum()
      np.testing.assert_allclose(out[token, head], direct, atol=1e-5)


def test_the_analytic_bytes_are_those_that_the_kernel_copies(monkeypatch):
  """Counted within one block of queries: the interpreter forgets where the block before ended."""
  copied = []
  start = kernel.MultiPageAsyncCopyDescriptor.start

  def count(self):
    size = sum(np.prod(c.dst_ref.shape) * c.dst_ref.dtype.itemsize for c in self._async_copies)
    jax.debug.callback(lambda: copied.append(int(size)))
    start(self)

  monkeypatch.setattr(kernel.MultiPageAsyncCopyDescriptor, 'start', count)
  monkeypatch.setattr(ragged, 'MIN_BLOCK', 2 * PAGE)
  monkeypatch.setattr(ragged, 'MAX_BLOCK', 2 * PAGE)
  keys, queries = [33, 5, 48], [1, 3, 4]
  args = keys, ROW_PAGES, np.cumsum([0, *queries]), [3]
  args = (jnp.asarray(x, jnp.int32) for x in args)
  q, kv = draw(0, sum(queries), HEADS, H), draw(1, PAGES, PAGE, 2 * KV_HEADS, H)
  ragged.call_kernel(q, kv, *args, 32, None, False, True)[0].block_until_ready()
  jax.effects_barrier()
  token_bytes = 2 * KV_HEADS * H * 4
  expected = ragged.bytes_fetched(queries, keys, PAGE, N, token_bytes)
  assert sum(copied) == expected == (2 + 1 + 2) * 2 * PAGE * token_bytes
  # Tokens 32 to 39 of the last sequence are in a second block of queries.
  fetched = ragged.bytes_fetched([20, 20], [33, 20], PAGE, N, token_bytes)
  assert fetched == (2 + 2 * 1) * 2 * PAGE * token_bytes


def test_the_choice_for_a_device():
  mesh = make_mesh(1, devices=jax.devices()[:1])
  assert choose_cached('auto', config(), 'float32', 64, mesh) == 'pages'
  with pytest.raises(UserError, match='runs on TPUs only'):
    choose_cached('ragged', config(), 'float32', 64, mesh)
  with pytest.raises(UserError, match='runs on GPUs only'):
    choose_cached('triton', config(), 'float32', 64, mesh)
  assert triton.refuse(config(), 'bfloat16', 64, mesh) is None
  assert 'heads' in triton.refuse(config(head_dim=96), 'bfloat16', 64, mesh)
  assert 'page_tokens' in triton.refuse(config(), 'bfloat16', 48, mesh)
  assert ragged.refuse(config(), 'bfloat16', 64, mesh) is None
  assert 'heads' in ragged.refuse(config(head_dim=64), 'bfloat16', 64, mesh)
  assert 'page_tokens' in ragged.refuse(config(), 'bfloat16', 24, mesh)
  assert 'float16' in ragged.refuse(config(), 'float16', 64, mesh)


@pytest.mark.parametrize(('mesh', 'name'), [(A100, 'triton'), (T4, 'pages'), (AMD, 'pages')])
def test_the_kernel_for_gpus_is_chosen_where_it_compiles(mesh, name):
  assert choose_cached('auto', config(), 'bfloat16', 64, mesh) == name
  if name == 'pages':
    with pytest.raises(UserError, match="'triton' needs an NVIDIA GPU with .* 8.0 .* Set it to"):
      choose_cached('triton', config(), 'bfloat16', 64, mesh)


@pytest.mark.parametrize(
  ('h', 'dtype', 'block', 'stages'),
  [
    (64, 'bfloat16', 64, 3),
    (128, 'bfloat16', 64, 3),
    (256, 'bfloat16', 32, 3),
    (512, 'bfloat16', 16, 1),
    (128, 'float32', 32, 3),
    (256, 'float32', 16, 1),
  ],
)
def test_larger_heads_have_smaller_blocks(h, dtype, block, stages):
  """Compiled for the capabilities 8.0 and 9.0, these need 24 to 89 KiB of shared memory."""
  assert triton.refuse(config(head_dim=h), dtype, 64, A100) is None
  assert triton.choose_block(512, 64, h * jnp.dtype(dtype).itemsize) == (block, stages)
  assert triton.choose_block(3, 64, h * jnp.dtype(dtype).itemsize) == (16, stages)
  shapes = (2, 1, 512, h), (12, 2, 64, h), (2, 128), (2, 40), (2,)
  dtypes = dtype, dtype, 'int32', 'int32', 'int32'
  args = (jax.ShapeDtypeStruct(*x) for x in zip(shapes, dtypes, strict=True))
  run = functools.partial(
    triton.read_sequences, window=100, scores=Scores(0.3, 50.0), is_partial=False, interpret=False
  )
  # Newer versions of jax ask for the device. The interpreter does not lower kernels.
  device = jax.sharding.AbstractDevice('NVIDIA A100-SXM4-80GB', 108, 'gpu')
  mesh = jax.sharding.AbstractMesh((1,), ('data',), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    jax.jit(run).trace(*args).lower(lowering_platforms=('cuda',))


def test_a_jax_without_the_backend_has_xlas_products(monkeypatch):
  monkeypatch.setattr(triton, 'plgpu', None)
  assert choose_cached('auto', config(), 'bfloat16', 64, A100) == 'pages'
  with pytest.raises(UserError, match="needs Pallas's Triton backend"):
    choose_cached('triton', config(), 'bfloat16', 64, A100)


def test_heads_that_are_too_large_for_a_page_are_refused():
  with pytest.raises(UserError, match='pages of at most 32 tokens for heads of 512 .* in float32'):
    choose_cached('triton', config(head_dim=512), 'float32', 64, A100)
  assert choose_cached('auto', config(head_dim=512), 'float32', 64, A100) == 'pages'
  assert choose_cached('auto', config(head_dim=512), 'float32', 32, A100) == 'triton'
