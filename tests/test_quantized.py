"""Quantized kernels: what they stand for, what they take, and that every user of them agrees."""

import dataclasses
import functools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cai_jax.data import units
from cai_jax.model import lm as lm_lib
from cai_jax.model import lora
from cai_jax.model.config import Experts, ModelConfig
from cai_jax.model.quantized import nf4
from cai_jax.model.quantized.kernel import (
  FORMATS,
  AdaptedKernel,
  dequantize,
  is_quantized,
  multiply,
)
from cai_jax.model.quantized_params import check_weights, param_bytes, quantizable, quantize_params
from cai_jax.model.sharding import flatten_params, param_shardings
from cai_jax.model.transformer import init_params
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import make_mesh
from cai_jax.sampling.auto import measure_load
from cai_jax.sampling.config import EngineConfig
from cai_jax.sampling.engine import Engine
from cai_jax.sampling.types import SamplingConfig, Turn
from cai_jax.training.config import TrainConfig
from cai_jax.training.loop import fit
from cai_jax.training.trainable import divide_model

CONFIG = ModelConfig('llama', 64, 32, 64, 2, 4, 2, 8, 128)
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 8))
FORMAT_NAMES = ('int8', 'nf4')
# The largest distance of a weight from its rounded value, as a share of the largest in its block.
LARGEST_ERROR = {'int8': 0.5 / 127, 'nf4': 0.16}


dense = jax.jit(dequantize)


@functools.partial(jax.jit, static_argnums=(0, 2))
def quantize(name, kernel, outs):
  return FORMATS[name].quantize(kernel, outs)


@functools.partial(jax.jit, static_argnums=1)
def quantize_all(params, name):
  return quantize_params(params, CONFIG, name)


@jax.jit
def dense_params(params):
  return jax.tree.map(dequantize, params, is_leaf=is_quantized)


def one_device():
  return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope='module')
def params():
  return init_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope='module', params=FORMAT_NAMES)
def quantized(request, params):
  return request.param, quantize_all(params, request.param)


@pytest.fixture
def items():
  rng = np.random.default_rng(0)
  lengths = rng.integers(4, 16, 24)
  return [
    units.Example(rng.integers(0, 64, n).astype(np.int32), np.arange(n) >= n // 2) for n in lengths
  ]


def test_the_numbers_of_nf4_are_quantiles_of_the_normal_distribution():
  """Dettmers et al. 2023, section 3 and appendix E: 8 positive and 7 negative quantiles, and 0."""
  offset = 1 - (1 / 30 + 1 / 32) / 2
  quantile = statistics.NormalDist().inv_cdf
  positive = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
  negative = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
  numbers = sorted([*positive, *negative, 0.0])
  np.testing.assert_allclose(np.array(numbers) / max(numbers), nf4.NUMBERS, atol=2e-4)


def largest_in_blocks(kernel, axis):
  """Return for each weight the largest absolute value of its block along an axis."""
  size = kernel.shape[axis]
  block = math.gcd(size, nf4.BLOCK)
  blocks = np.abs(kernel).reshape(
    *kernel.shape[:axis], size // block, block, *kernel.shape[axis + 1 :]
  )
  return np.repeat(blocks.max(axis + 1), block, axis)


@pytest.mark.parametrize('shape, outs', [((48, 4, 8), 2), ((4, 64, 8), 1)])
@pytest.mark.parametrize('name', FORMAT_NAMES)
def test_a_kernel_is_rounded_to_the_nearest_numbers(name, shape, outs):
  kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  kernel[..., 0] = 0  # a channel of zeros
  stored = quantize(name, kernel, outs)
  back = np.asarray(dense(stored))
  assert stored.shape == back.shape == shape and back.dtype == np.float32
  assert all(x.ndim == len(shape) for x in jax.tree.leaves(stored))
  ins = tuple(range(len(shape) - outs))
  largest = np.abs(kernel).max(ins, keepdims=True)
  scale_error = 0.0
  if name == 'nf4':
    scale_error = largest / nf4.LARGEST / 2  # of a block, whose scale is rounded too
    largest = largest_in_blocks(kernel, ins[-1])
  assert (np.abs(back - kernel) <= LARGEST_ERROR[name] * largest + scale_error + 1e-6).all()
  assert not back[..., 0].any()
  # What is rounded already stays as it is.
  np.testing.assert_allclose(dense(quantize(name, back, outs)), back, rtol=0.01)


def test_a_packed_kernel_has_each_code_once():
  """Blocks of 64 with powers of two as largest values, in each of which every number occurs."""
  numbers = np.tile(np.array(nf4.NUMBERS, np.float32), 8)
  kernel = np.stack([numbers, 255 * numbers], 1) * np.repeat(np.float32([1, 0.2]), 64)[:, None]
  stored = quantize('nf4', kernel, 1)
  assert stored.codes.shape == (64, 2) and stored.scales.tolist() == [[255, 255], [51, 51]]
  np.testing.assert_allclose(dense(stored), kernel, rtol=1e-6)


def test_nf4_refuses_an_odd_number_of_inputs():
  with pytest.raises(UserError, match="7 inputs along axis 0.*Choose 'int8'"):
    nf4.Nf4Kernel.quantize(jnp.ones((7, 3)), 1)


@pytest.mark.parametrize('dtype, tolerance', [('float32', 1e-5), ('bfloat16', 0.02)])
@pytest.mark.parametrize('name', FORMAT_NAMES)
def test_products_and_gradients_are_those_of_the_dequantized_kernel(name, dtype, tolerance):
  x, kernel = np.random.default_rng(0).normal(size=(2, 64, 64)).astype(np.float32)
  stored = quantize(name, kernel, 1)
  x = x.astype(jnp.dtype(dtype))

  def product(x, kernel):
    y = multiply(x, kernel, 64, rounds=False)
    return (y**2).sum(), y

  def check(ours, exact):
    ours, exact = (np.asarray(z).astype(np.float32) for z in (ours, exact))
    np.testing.assert_allclose(ours, exact, atol=tolerance * np.abs(exact).max())

  gradient = jax.jit(jax.grad(product, has_aux=True))
  (ours, y), (exact, expected) = gradient(x, stored), gradient(x, dense(stored))
  assert y.dtype == jnp.float32 and ours.dtype == x.dtype
  check(y, expected)
  check(ours, exact)


def test_the_kernels_of_all_linear_layers_are_quantized(quantized, params):
  name, stored = quantized
  leaves = flatten_params(stored)
  assert {path for path, x in leaves.items() if is_quantized(x)} == quantizable(CONFIG).keys()
  others = {path for path in leaves if not is_quantized(leaves[path])}
  assert others == {'embed/table', 'head/table', 'norm/scale'} | {
    f'layers/{i}/{norm}/scale' for i in range(2) for norm in ('attention_norm', 'mlp_norm')
  }
  assert param_bytes(CONFIG, 'float32', name) == sum(x.nbytes for x in jax.tree.leaves(stored))
  load = measure_load([(CONFIG, 'float32', name)], one_device())
  full = measure_load([(CONFIG, 'float32')], one_device())
  assert load.parameters == param_bytes(CONFIG, 'float32', name) < full.parameters
  assert load.token == full.token


def test_loading_quantizes_as_the_whole_model_would_be(tiny_hf_folder, tmp_path):
  folder, two = tiny_hf_folder('qwen2'), make_mesh(1, 1, 2, devices=jax.devices()[:2])
  full = lm_lib.load(folder, 'bfloat16', one_device())
  exact = lm_lib.load(folder, mesh=one_device())
  quantize = jax.jit(
    lambda params, name: quantize_params(params, exact.config, name), static_argnums=1
  )
  for name, mesh in (('nf4', one_device()), ('int8', two)):
    expected = flatten_params(quantize(exact.params, name))
    lm = lm_lib.load(folder, 'bfloat16', mesh, weights=name)
    assert lm.weights == name and lm.fingerprint != full.fingerprint
    for path, x in flatten_params(lm.params).items():
      if is_quantized(x):
        jax.tree.map(np.testing.assert_array_equal, x, expected[path])
      else:
        assert x.dtype == jnp.bfloat16
    assert jax.tree.map(lambda x: x.sharding, lm.params) == param_shardings(lm.params, mesh)
  with pytest.raises(UserError, match='tensor=2 does not divide dimension 3 of layers/.*/scales'):
    lm_lib.load(folder, mesh=two, weights='nf4')
  # A quantized model is saved as the numbers that it stands for.
  lm_lib.save(lm, tmp_path, 'float32')
  saved = flatten_params(lm_lib.load(tmp_path, mesh=one_device()).params)
  for path, x in flatten_params(lm.params).items():
    np.testing.assert_array_equal(saved[path], np.asarray(dequantize(x), np.float32))


def test_logits_are_those_of_the_dequantized_model(quantized, tiny_tokenizer):
  _, stored = quantized
  exact = dense_params(stored)
  logits = [
    lm_lib.LM(CONFIG, p, tiny_tokenizer, one_device(), 'float32', '', '').logits(TOKENS)
    for p in (stored, exact)
  ]
  np.testing.assert_allclose(*logits, atol=1e-5)


def chain(context):
  completion = yield Turn('turn', context, SamplingConfig(max_tokens=8), 'base')
  return completion


@pytest.mark.slow
def test_sampled_tokens_are_those_of_the_dequantized_model(quantized, tiny_tokenizer):
  _, stored = quantized
  rng = np.random.default_rng(0)
  contexts = [rng.integers(1, 60, rng.integers(1, 20)).tolist() for _ in range(5)]
  results = []
  two = make_mesh(1, 1, 2, devices=jax.devices()[:2])
  for held, slots, mesh in (
    (stored, 2, one_device()),
    (stored, 4, two),
    (dense_params(stored), 2, one_device()),
  ):
    placed = jax.device_put(held, param_shardings(held, mesh))
    lm = lm_lib.LM(CONFIG, placed, tiny_tokenizer, mesh, 'float32', '', '')
    sizes = EngineConfig(slots=slots, prefill_tokens=16, prefill_width=8, longest_burst=4)
    engine = Engine({'base': lm}, length=64, seed=0, config=sizes, stops={'base': ((), ())})
    completions = dict(engine.run([(str(i), chain(c)) for i, c in enumerate(contexts)]))
    results.append({name: c.tokens for name, c in completions.items()})
  assert results[0] == results[1] == results[2]
  assert len({tuple(t) for t in results[0].values()}) > 1


TRAIN = TrainConfig(
  attention='blocks',
  batch_size=4,
  max_length=16,
  learning_rate=1e-2,
  eps=1e-2,
  warmup=0.0,
  lora_rank=2,
)


@pytest.mark.parametrize('name', ['int8', pytest.param('nf4', marks=pytest.mark.slow)])
def test_adapters_are_trained_over_a_quantized_base(name, params, items, tmp_path):
  """The loss, the merged model and a resumed run are those of training over its dense numbers."""
  config = dataclasses.replace(TRAIN, base_weights=name)
  stored = quantize_all(params, name)
  exact = dense_params(stored)
  expected, _ = fit(CONFIG, exact, items, TRAIN, one_device(), tmp_path / 'dense')
  trained, summary = fit(CONFIG, stored, items, config, one_device(), tmp_path / 'quantized')
  kernel = trained['layers'][0]['mlp']['up']['kernel']
  assert isinstance(kernel, AdaptedKernel) and jnp.abs(kernel.b).max() > 0
  initial, expected = flatten_params(exact), flatten_params(expected)
  for path, x in flatten_params(trained).items():
    change = np.abs(np.asarray(expected[path]) - initial[path]).max()
    np.testing.assert_allclose(dequantize(x), expected[path], rtol=1e-5, atol=0.01 * change)
  stored = quantize_all(params, name)  # a step takes over the kernels
  again, resumed = fit(CONFIG, stored, items, config, one_device(), tmp_path / 'quantized')
  assert resumed['resumed_at'] == summary['steps']
  jax.tree.map(np.testing.assert_array_equal, again, trained)


def test_merged_adapters_keep_the_logits(quantized, tiny_tokenizer):
  _, stored = quantized
  config = TRAIN.lora
  initial = lora.init(CONFIG, config, jax.random.key(0))
  adapters = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.3), initial)
  graph, _ = lora.abstract_model(CONFIG, config)
  positions = np.broadcast_to(np.arange(8), TOKENS.shape).astype(np.int32)
  joined = lora.join(adapters, stored)
  compute = jax.jit(lm_lib.compute_logits, static_argnums=0)
  logits = compute(graph, joined, TOKENS, positions, None)
  merged = lora.merge(stored, adapters, config)
  lm = lm_lib.LM(CONFIG, merged, tiny_tokenizer, one_device(), 'float32', '', '')
  scale = np.abs(logits).max()
  np.testing.assert_allclose(lm.logits(TOKENS), logits, atol=1e-5 * scale)


def test_the_backward_pass_keeps_no_dequantized_matrix(params):
  """What a gradient keeps of a product is the kernel as it is stored."""
  stored = quantize('nf4', jnp.ones((64, 32)), 1)
  _, pull_back = jax.vjp(lambda x: multiply(x, stored, 32, False), jnp.ones((2, 64), jnp.bfloat16))
  kept = jax.tree.leaves(pull_back)
  assert max(x.size for x in kept) == 64 * 32 // 2  # the codes


def test_what_cannot_be_quantized_is_refused():
  experts = dataclasses.replace(CONFIG, experts=Experts(4, 2, 8, False, False))
  with pytest.raises(UserError, match="model.weights='int8': the matrices of experts"):
    check_weights(experts, 'int8', 'model.weights')
  odd = ModelConfig('llama', 64, 33, 64, 1, 4, 2, 8, 128)
  with pytest.raises(UserError, match="train.base_weights='nf4': .*33 inputs"):
    check_weights(odd, 'nf4', 'train.base_weights')
  check_weights(odd, 'int8', 'train.base_weights')
  with pytest.raises(UserError, match="weights='fp4' is not one of"):
    check_weights(CONFIG, 'fp4', 'weights')
  with pytest.raises(UserError, match="train.base_weights='nf4' has no effect"):
    TrainConfig(base_weights='nf4')


def test_a_model_in_another_format_is_not_trained(params):
  stored = quantize_all(params, 'int8')
  nf4_base = dataclasses.replace(TRAIN, base_weights='nf4')
  full = dataclasses.replace(TRAIN, lora_rank=0)
  for given, config, held, needed in (
    (params, nf4_base, 'full', 'nf4'),
    (stored, nf4_base, 'int8', 'nf4'),
    (stored, TRAIN, 'int8', 'full'),
    (stored, full, 'int8', 'full'),
  ):
    match = f"are in '{held}', but train.base_weights='{needed}'. Load .* weights='{needed}'"
    with pytest.raises(UserError, match=match):
      divide_model(CONFIG, given, config, one_device())
  adapters = lora.init(CONFIG, TRAIN.lora, jax.random.key(0))
  with pytest.raises(UserError, match='Save it, and load it again'):
    divide_model(CONFIG, lora.merge(stored, adapters, TRAIN.lora), nf4_base, one_device())
