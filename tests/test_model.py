"""The transformer agrees with torch, and with itself under caching, packing and other dtypes."""

import dataclasses
import functools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

import cai_jax
from cai_jax.model import cache as cache_lib
from cai_jax.model.attention.rotary import rotary_angles
from cai_jax.model.families.family import config_to_hf
from cai_jax.model.sharding import flatten_params
from cai_jax.model.transformer import abstract_model, init_params
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import make_mesh
from cai_jax.sampling import device

B, T, LAYERS = 3, 24, 3
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(3, 300, (B, T))
LENGTHS = np.array([24, 17, 5])  # real tokens of padded rows


@pytest.fixture(scope='session')
def load(tiny_hf_folder):
  """`load(family)` returns the family's tiny model on one device, loaded once per session."""
  loaded = {}

  def get(family):
    if family not in loaded:
      mesh = make_mesh(1, devices=jax.devices()[:1])
      loaded[family] = cai_jax.load(tiny_hf_folder(family), mesh=mesh)
    return loaded[family]

  return get


@pytest.fixture(scope='session')
def torch_model(tiny_hf_folder):
  """`torch_model(family)` returns the same model in torch, in f32 with eager attention."""
  return lambda family: transformers.AutoModelForCausalLM.from_pretrained(
    tiny_hf_folder(family), dtype=torch.float32, attn_implementation='eager'
  ).eval()


@functools.partial(jax.jit, static_argnums=0)
def forward(graph, params, *args):
  model = nnx.merge(graph, params)
  hidden, cache = model(*args)
  return model.unembed(hidden), cache


def run(lm, *args):
  """Return the logits and the cache of `Transformer.__call__(*args)`."""
  return forward(lm.graph, lm.params, *args)


def positions(batch, length, start=0):
  return jnp.broadcast_to(jnp.arange(start, start + length), (batch, length))


def test_logits_agree_with_torch(load, torch_model, family):
  lm, model = load(family), torch_model(family)
  with torch.no_grad():
    reference = model(torch.tensor(TOKENS)).logits.numpy()
  logits = lm.logits(TOKENS)
  assert logits.shape == (B, T, lm.config.vocab_size) and logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, reference, atol=1e-4, rtol=0)
  assert reference.std() > 0.5  # flat logits would agree trivially
  for side in ('left', 'right'):
    mask = np.arange(T)[None] < LENGTHS[:, None]
    mask = mask[:, ::-1] if side == 'left' else mask
    tokens = np.zeros_like(TOKENS)
    for row, length in enumerate(LENGTHS):
      tokens[row, mask[row]] = TOKENS[row, :length]
    position_ids = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
      theirs = model(
        torch.tensor(tokens),
        attention_mask=torch.tensor(mask.astype(np.int64)),
        position_ids=torch.tensor(position_ids),
      ).logits.numpy()
    for nonzero in (mask, mask * 7):  # any nonzero value marks a real token
      ours = np.asarray(lm.logits(tokens, nonzero))
      np.testing.assert_allclose(ours[mask], theirs[mask], atol=1e-4, rtol=0)
    for row, length in enumerate(LENGTHS):  # padding changes nothing
      np.testing.assert_allclose(ours[row, mask[row]], reference[row, :length], atol=1e-4, rtol=0)


def test_later_tokens_do_not_change_earlier_logits(load, family):
  lm = load(family)
  changed = TOKENS.copy()
  changed[:, 12:] = RNG.permutation(changed[:, 12:], axis=1)[::-1]
  before, after = lm.logits(TOKENS), lm.logits(changed)
  np.testing.assert_array_equal(before[:, :12], after[:, :12])
  assert np.abs(before[:, 12:] - after[:, 12:]).max() > 0.1


def test_a_window_hides_older_tokens(load):
  """Three layers of window 5 reach 12 tokens back, but not 13."""
  lm = load('mistral')
  changed = TOKENS.copy()
  changed[:, 0] = changed[:, 0] % 300 + 1
  difference = np.abs(lm.logits(changed) - lm.logits(TOKENS)).max((0, 2))
  assert (difference[:13] > 0).all() and (difference[13:] == 0).all()


def test_cached_decode_equals_the_full_forward(load, family):
  """The prompt comes in two chunks, then token by token, with a cache longer than the row."""
  lm = load(family)
  full = np.asarray(lm.logits(TOKENS))
  cache = cache_lib.init_cache(lm.config, B, ((5, 6, T - 6),) * LAYERS, jnp.float32)
  pieces, start = [], 0
  for length in (7, 7, *[1] * 10):
    logits, cache = run(
      lm, TOKENS[:, start : start + length], positions(B, length, start), None, cache
    )
    pieces.append(logits)
    start += length
  np.testing.assert_allclose(np.concatenate(pieces, axis=1), full, atol=1e-4, rtol=0)


def test_angles_are_computed_once_for_all_layers(load):
  """Without `compute_once`, XLA for CPUs computes the cosines again in each layer."""
  lm = load('llama3')
  cache = cache_lib.init_cache(lm.config, B, ((T,),) * LAYERS, jnp.float32)
  zeros = jnp.zeros((B, 1), jnp.int32)
  compiled = forward.lower(lm.graph, lm.params, TOKENS[:, :1], zeros, None, cache).compile()
  assert compiled.as_text().count(' cosine(') == 1


def test_cached_rows_of_different_lengths_equal_the_full_forward(load):
  """Rows are prefilled together with padding, and each continues at its own position."""
  lm = load('llama3')
  full = np.asarray(lm.logits(TOKENS))
  lengths = np.array([9, 4, 1])
  cache = cache_lib.init_cache(lm.config, B, ((T,),) * LAYERS, jnp.float32)
  # A stale cache: queries must not see what is beyond a row's own tokens.
  cache = jax.tree.map(lambda x: x + 3.0, cache)
  padded = np.where(np.arange(9) < lengths[:, None], np.arange(9), -1)
  logits, cache = run(lm, TOKENS[:, :9], padded, None, cache)
  for row, length in enumerate(lengths):
    np.testing.assert_allclose(logits[row, :length], full[row, :length], atol=1e-4, rtol=0)
    np.testing.assert_array_equal(cache[0][0].v[row, :, length:], 3.0)
  for step in range(6):
    at = lengths + step
    tokens = TOKENS[np.arange(B), at][:, None]
    logits, cache = run(lm, tokens, at[:, None], None, cache)
    np.testing.assert_allclose(logits[:, 0], full[np.arange(B), at], atol=1e-4, rtol=0)


def test_spans_that_other_rows_reach_do_not_change_a_single_bit(load):
  lm = load('llama3')
  cache = cache_lib.init_cache(lm.config, B, ((16, 8, 8),) * LAYERS, jnp.float32)
  cache = jax.tree.map(lambda x: x + 3.0, cache)  # stale
  short = np.broadcast_to(positions(1, 14), (B, 14))
  far = short + np.array([[0], [0], [18]])  # only the last row reaches the last span
  without, _ = run(lm, TOKENS[:, :14], short, None, cache)
  with_last, _ = run(lm, TOKENS[:, :14], far, None, cache)
  np.testing.assert_array_equal(without[:2], with_last[:2])
  assert np.abs(without[2] - with_last[2]).max() > 0.1


@pytest.mark.parametrize(
  'length, count, sizes',
  [
    (100, 4, (100,)),
    (300, 4, (128, 128, 44)),
    (512, 4, (128,) * 4),
    (1500, 4, (384, 384, 384, 348)),
    (513, 4, (144, 144, 144, 81)),
    (513, 1, (513,)),
  ],
)
def test_spans_have_the_expected_sizes_and_cover_the_cache(length, count, sizes):
  assert cache_lib.split_spans(length, count)[: len(sizes)] == sizes
  assert sum(cache_lib.split_spans(length, count)) == length


@pytest.mark.parametrize('name', ['llama3', 'mistral'])
def test_packed_tokens_of_several_rows_equal_separate_rows(load, name):
  """Rows differ in length and progress; one takes two pieces, and there is padding between."""
  lm = load(name)
  full = np.asarray(lm.logits(TOKENS))
  lengths = cache_lib.cache_lengths(lm.config, 2 * T, 24)
  cache = cache_lib.init_cache(lm.config, 4, lengths, jnp.float32)
  cache = jax.tree.map(lambda x: x + 3.0, cache)
  parts = [[(2, 0, 11), (0, 0, 3)], [(0, 3, 9), (3, 0, 7)], [(2, 11, T), (3, 7, T), (0, 9, T)]]
  for parts_of_call in parts:
    chunk = device.Chunk.pack(
      [[device.Segment(row, TOKENS[row % B, a:b].tolist(), a, -1) for row, a, b in parts_of_call]],
      slots=4,
      size=48,
      width=8,
    )
    logits, cache = run(lm, chunk.tokens, chunk.positions, None, cache, chunk.packing)
    at = 0
    for row, a, b in parts_of_call:
      packed, at = logits[0, at : at + b - a], at + b - a
      np.testing.assert_allclose(packed, full[row % B, a:b], atol=1e-4, rtol=0)
  for segment in cache[0]:  # row 1 had no token: its stale cache is as it was
    np.testing.assert_array_equal(segment.v[1], 3.0)


def test_chunks_that_do_not_fit_are_refused():
  part = device.Segment(0, list(range(9)), 0, -1)
  with pytest.raises(ValueError, match='8 tokens in 6 pieces'):
    device.Chunk.pack([[part]], slots=1, size=8, width=2)


def test_packed_segments_equal_separate_rows(load, family):
  """One row holds three texts, each with positions from 0, and padding at the end."""
  lm = load(family)
  lengths = (8, 5, 9)
  packed = np.concatenate([*(TOKENS[row, :n] for row, n in enumerate(lengths)), [0, 0]])
  segments = np.repeat([1, 2, 3, 0], [*lengths, 2])
  restarted = np.concatenate([*(np.arange(n) for n in lengths), [0, 0]])
  logits, _ = run(lm, packed[None], restarted[None], segments[None])
  separate = lm.logits(TOKENS)
  for row, n in enumerate(lengths):
    ours = logits[0, segments == row + 1]
    np.testing.assert_allclose(ours, separate[row, :n], atol=1e-4, rtol=0)


def test_cache_and_segments_exclude_each_other(load):
  lm = load('llama2')
  cache = cache_lib.init_cache(lm.config, B, ((T,),) * LAYERS, jnp.float32)
  with pytest.raises(ValueError, match='pass one of the two'):
    run(lm, TOKENS, positions(B, T), np.ones((B, T), int), cache)


def test_bf16_logits_are_close_to_f32(load, tiny_hf_folder):
  """bf16 has 8 bits, so errors stay within a few per cent of the logits' standard deviation."""
  exact = np.asarray(load('qwen3').logits(TOKENS))
  mesh = make_mesh(1, devices=jax.devices()[:1])
  for kwargs in ({'param_dtype': 'float32'}, {}):
    lm = cai_jax.load(tiny_hf_folder('qwen3'), 'bfloat16', mesh, **kwargs)
    logits = lm.logits(TOKENS)
    assert logits.dtype == jnp.float32
    error = np.sqrt(np.mean((np.asarray(logits) - exact) ** 2))
    assert 0 < error < 0.05 * exact.std()


def test_half_precision_products_have_half_precision_gradients(load):
  """No product mixes f32 with bf16, which accelerators would compute at f32 speed."""
  lm = dataclasses.replace(load('qwen2'), dtype='bfloat16')

  def loss(params):
    return jnp.sum(forward(lm.graph, params, TOKENS, positions(B, T))[0])

  factor_dtypes = []

  def visit(jaxpr):
    for eqn in jaxpr.eqns:
      if eqn.primitive.name == 'dot_general':
        factor_dtypes.append({v.aval.dtype.name for v in eqn.invars})
      for inner in jax.extend.core.jaxprs_in_params(eqn.params):
        visit(inner)

  visit(jax.make_jaxpr(jax.grad(loss))(lm.params).jaxpr)
  assert len(factor_dtypes) > 3 * 7 * lm.config.num_layers
  assert {'bfloat16'} in factor_dtypes and {'bfloat16', 'float32'} not in factor_dtypes


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_decode_equals_the_full_forward(load, dtype):
  """XLA for CPUs does not support some half-precision products with one query per row."""
  lm = dataclasses.replace(load('llama3'), dtype=dtype)
  full = np.asarray(lm.logits(TOKENS))
  cache = cache_lib.init_cache(lm.config, B, ((2 * T,),) * LAYERS, jnp.dtype(dtype))
  _, cache = run(lm, TOKENS[:, :-1], positions(B, T - 1), None, cache)
  logits, _ = run(lm, TOKENS[:, -1:], positions(B, 1, T - 1), None, cache)
  np.testing.assert_allclose(logits[:, 0], full[:, -1], atol=0.06 * full.std())


def test_f32_products_are_not_rounded(load):
  """By default, accelerators round the factors of an f32 product."""
  lm = load('qwen2')
  text = forward.lower(lm.graph, lm.params, TOKENS, positions(B, T)).as_text()
  products = [line for line in text.splitlines() if 'dot_general' in line]
  assert products and all('precision = [HIGHEST, HIGHEST]' in line for line in products)


def test_llama3_rope_scaling_agrees_with_transformers(load):
  """Some frequencies are kept, some divided by the factor, and some interpolated."""
  config = load('llama3').config
  hf = transformers.AutoConfig.for_model(**config_to_hf(config))
  rope = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(hf)
  range_40 = positions(1, 40)
  cos, sin = rope(torch.zeros(1, 1), torch.tensor(np.array(range_40)))
  ours = rotary_angles(config, range_40)
  half = config.head_dim // 2
  np.testing.assert_allclose(ours[0], cos[..., :half].numpy(), atol=1e-5)
  np.testing.assert_allclose(ours[1], sin[..., :half].numpy(), atol=1e-5)
  plain = config.rope_theta ** -(np.arange(half) / half)
  ratio = rope.inv_freq.numpy() / plain
  assert ratio[0] == 1 and np.isclose(ratio[-1], 1 / 8)
  assert ((ratio > 0.13) & (ratio < 0.99)).any()


def test_initial_parameters_are_independent_and_reproducible(load):
  """Also, the predictions of an initial model are nearly flat."""
  config = dataclasses.replace(load('llama2').config, num_layers=1)
  params = init_params(config, jax.random.key(0))
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), abstract_model(config)[1])
  assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == shapes
  leaves = flatten_params(params).items()
  kernels = [np.asarray(x) for path, x in leaves if path.endswith(('kernel', 'table'))]
  assert len({float(x.flat[0]) for x in kernels}) == len(kernels)
  initial = dataclasses.replace(load('llama2'), config=config, params=params)
  assert 0.1 < np.asarray(initial.logits(TOKENS)).std() < 2
  again = init_params(config, jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, again, params)


def test_tokens_and_masks_of_the_wrong_shape_or_range_are_refused(load):
  lm = load('llama2')
  for tokens, mask, message in (
    (TOKENS[0], None, r'tokens \(24,\)'),
    (TOKENS, np.ones((B, T - 1)), r'mask \(3, 23\)'),
    (np.full((1, 2), lm.config.vocab_size), None, r'384\.\.384, but must be in 0\.\.383'),
    (np.full((1, 2), -1), None, r'-1\.\.-1'),
  ):
    with pytest.raises(UserError, match=message):
      lm.logits(tokens, mask)


def test_half_precision_embeddings_have_gradients(load):
  """Sampling on CPUs looks them up as bits, which have no gradient."""
  lm = load('qwen2')
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), lm.params)
  graph = dataclasses.replace(lm, dtype='bfloat16').graph

  def loss(params):
    return jnp.sum(forward(graph, params, TOKENS, positions(B, T))[0] ** 2)

  gradient = jax.grad(loss)(params)['embed']['table']
  assert float(jnp.abs(gradient.astype(jnp.float32)).sum()) > 1
