"""The transformer: windows, dtypes, rotary scaling, initial parameters and refused inputs."""

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
from cai_jax.model.attention.rotary import rotary_angles
from cai_jax.model.families.family import config_to_hf
from cai_jax.model.sharding import flatten_params
from cai_jax.model.transformer import abstract_model, init_params
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import make_mesh

pytestmark = pytest.mark.usefixtures('full_optimization')

B, T = 3, 24
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(3, 300, (B, T))


@functools.partial(jax.jit, static_argnums=0)
def forward(graph, params, *args):
  model = nnx.merge(graph, params)
  return model.unembed(model(*args))


def positions(batch, length, start=0):
  return jnp.broadcast_to(jnp.arange(start, start + length), (batch, length))


def test_a_window_hides_older_tokens(load):
  """Three layers of window 5 reach 12 tokens back, but not 13."""
  lm = load('mistral')
  changed = TOKENS.copy()
  changed[:, 0] = changed[:, 0] % 300 + 1
  difference = np.abs(lm.logits(changed) - lm.logits(TOKENS)).max((0, 2))
  assert (difference[:13] > 0).all() and (difference[13:] == 0).all()


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
  ours = rotary_angles(config.rope(0), config.head_dim, range_40)
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
