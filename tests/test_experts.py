"""Mixtures of experts: products by group, routing, and experts on eight devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cai_jax.model import lora
from cai_jax.model.config import Experts, ModelConfig
from cai_jax.model.experts import MoE, grouped_product, run_experts, sum_tiles
from cai_jax.model.sharding import flatten_params, param_shardings
from cai_jax.model.transformer import abstract_model
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import batch_sharding, make_mesh
from cai_jax.training.losses import negative_log_likelihood
from tests.test_choices import draw_params

CONFIG = ModelConfig('other', 320, 32, 48, 3, 4, 2, 8, 64)
EXPERTS = Experts(8, 2, 40, dense_layers=(1,))
MIXTURE = dataclasses.replace(CONFIG, experts=EXPERTS)
INS, OUTS = 24, 40
SIZES = [
  [5, 0, 9, 1, 0, 40],
  [0, 0, 0, 0, 0, 55],
  [1, 1, 1, 1, 1, 1],
  [0, 0, 0, 0, 0, 0],
  [32, 0, 4, 8, 11, 0],
]


def normal(seed, *shape, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), shape, dtype)


@pytest.mark.parametrize('sizes', [[130, 0, 9, 1], [0, 0, 0, 0], [0, 0, 0, 260], [128, 128, 0, 1]])
def test_the_sums_of_a_tpu_are_those_of_each_group(sizes):
  """Rows behind the groups may be anything."""
  behind = (jnp.arange(300) >= sum(sizes))[:, None]
  x, y = (jnp.where(behind, jnp.nan, normal(i, 300, n)) for i, n in enumerate((INS, OUTS)))
  ends = np.cumsum(sizes)
  expected = [
    x[end - size : end].T @ y[end - size : end] for size, end in zip(sizes, ends, strict=True)
  ]
  sums = sum_tiles(x, y, jnp.array(sizes), interpret=True)
  np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('sizes', SIZES)
def test_grouped_products_and_their_gradients(sizes, dtype):
  """Rows behind the groups, here at least two, take no part in a gradient."""
  x, kernel = normal(0, 57, INS, dtype=dtype), normal(1, 6, INS, OUTS, dtype=dtype)
  cotangent, total = normal(2, 57, OUTS), sum(sizes)
  cotangent = cotangent.at[total:].set(0)
  groups = np.repeat(np.arange(6), sizes)

  def each_row(x, kernel):
    rows = jnp.einsum(
      'XI,XIO->XO',
      x[:total],
      kernel[groups],
      preferred_element_type=jnp.float32,
      precision='highest',
    )
    return jnp.pad(rows, ((0, 57 - total), (0, 0)))

  ours, pull_back = jax.vjp(lambda *a: grouped_product(*a, jnp.array(sizes)), x, kernel)
  expected, expected_pull_back = jax.vjp(each_row, x, kernel)
  tolerance = 1e-5 if dtype == 'float32' else 0.2
  assert ours.dtype == jnp.float32
  np.testing.assert_allclose(ours[:total], expected[:total], atol=1e-4)
  for a, b in zip(pull_back(cotangent), expected_pull_back(cotangent), strict=True):
    assert a.dtype == b.dtype
    scale = 1 + np.abs(np.asarray(b, np.float32)).max()
    np.testing.assert_allclose(
      np.asarray(a, np.float32), np.asarray(b, np.float32), atol=tolerance / 8 * scale
    )


def make_layer(config=MIXTURE):
  return MoE(config, nnx.Rngs(0), jnp.float32)


def all_experts(layer, x):
  """Return the sum over all experts, of which those that are not chosen have weight 0."""
  config, p = layer.config, layer.experts

  def biased(product, kernel):
    return product if kernel.bias is None else product + kernel.bias[...]

  logits = biased(jnp.einsum('btd,de->bte', x, layer.router.kernel[...]), layer.router)
  probabilities = jax.nn.softmax(logits)
  order = jnp.argsort(-probabilities)[..., : config.per_token]
  weights = jnp.zeros_like(probabilities)
  for i in range(config.per_token):
    chosen = jax.nn.one_hot(order[..., i], config.number)
    weights = weights + chosen * probabilities
  if config.renormalize or not config.softmax_first:
    weights = weights / weights.sum(-1, keepdims=True)
  gate, up = (biased(jnp.einsum('btd,edf->btef', x, k.kernel[...]), k) for k in (p.gate, p.up))
  if config.limit:
    gate, up = jnp.minimum(gate, config.limit), jnp.clip(up, -config.limit, config.limit)
  hidden = jax.nn.silu(gate) * (up + config.up_offset)
  out = biased(jnp.einsum('btef,efd->bted', hidden, p.down.kernel[...]), p.down)
  return jnp.einsum('bte,bted->btd', weights, out)


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'renormalize': False},
    {'softmax_first': False},
    {'per_token': 8},
    {'bias': True, 'limit': 1.5, 'up_offset': 1.0},
  ],
)
def test_a_layer_equals_the_sum_over_all_experts_and_so_do_its_gradients(changes):
  """Choosing before or after the softmax gives the same weights, once they are renormalized."""
  layer = make_layer(dataclasses.replace(MIXTURE, experts=dataclasses.replace(EXPERTS, **changes)))
  graph, params = nnx.split(layer)
  keys = iter(jax.random.split(jax.random.key(2), 9))
  params = jax.tree.map(  # biases start at zero
    lambda p: p if p.any() else 0.5 * jax.random.normal(next(keys), p.shape), params
  )
  x, target = 3 * normal(0, 3, 11, 32), normal(1, 3, 11, 32)

  def loss(run, params, x):
    return jnp.sum(run(nnx.merge(graph, params), x) * target)

  with jax.default_matmul_precision('highest'):
    ours = jax.value_and_grad(loss, (1, 2))(lambda layer, x: layer(x)[0], params, x)
    expected = jax.value_and_grad(loss, (1, 2))(all_experts, params, x)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4), ours, expected)
  assert np.abs(ours[1][0]['router']['kernel'][...]).max() > 1e-3


def test_other_tokens_change_no_bit_and_padding_takes_no_part():
  """Neither their number nor their values do, so groups of all sizes give the same bits."""
  layer = make_layer()
  run = jax.jit(lambda x, real: layer(x, real)[0])
  x = normal(0, 1, 200, 32)
  whole = run(x, jnp.ones((1, 200), bool))
  weights, ids, _ = layer.route(x)
  routed = jax.jit(lambda *args: run_routed(layer, *args))
  for rows in (1, 2, 7, 64):
    few = routed(x[:, :rows], weights[:, :rows], ids[:, :rows])
    np.testing.assert_array_equal(few, whole[:, :rows])
  real = jnp.arange(200)[None] % 3 != 1
  part = run(x.at[:, 1::3].set(jnp.nan), real)
  np.testing.assert_array_equal(part[real], whole[real])
  np.testing.assert_array_equal(part[~real], 0)


def run_routed(layer, x, weights, ids):
  p = layer.experts
  kernels = (p.gate.kernel[...], p.up.kernel[...], p.down.kernel[...])
  return run_experts('silu', EXPERTS, x, weights, ids, *kernels)


@pytest.mark.parametrize(
  ('shape', 'bias'),
  [
    pytest.param((1, 1, 1, 8), False, marks=pytest.mark.slow),
    pytest.param((2, 1, 2, 2), False, marks=pytest.mark.slow),
    pytest.param((1, 2, 2, 2), False, marks=pytest.mark.slow),
    pytest.param((2, 2, 1, 2), False, marks=pytest.mark.slow),
    ((1, 2, 2, 2), True),
  ],
)
def test_experts_on_eight_devices_equal_those_on_one(shape, bias):
  """The loss and all gradients; axes are data, fsdp, tensor and expert."""
  *sizes, expert = shape
  mesh = make_mesh(*sizes, expert=expert)
  model = dataclasses.replace(MIXTURE, experts=dataclasses.replace(EXPERTS, bias=bias))
  graph, params = abstract_model(model)[0], draw_params(model)
  tokens = jax.random.randint(jax.random.key(1), (8, 12), 0, 320)
  lengths = jnp.arange(8)[:, None] + 5
  batch = {
    'tokens': tokens,
    'positions': jnp.broadcast_to(jnp.arange(12), (8, 12)),
    'segment_ids': (jnp.arange(12) < lengths).astype(jnp.int32),
    'loss_mask': jnp.ones((8, 12), jnp.int32),
  }

  def loss(params, batch, sharding=None):
    return negative_log_likelihood(graph, params, batch, sharding, attention='xla')[0]

  expected = jax.jit(jax.value_and_grad(loss))(params, batch)
  sharding = batch_sharding(mesh)
  placed = jax.device_put(params, param_shardings(params, mesh))
  run = jax.jit(jax.value_and_grad(lambda p, b: loss(p, b, sharding)))
  ours = run(placed, jax.device_put(batch, sharding))
  np.testing.assert_allclose(ours[0], expected[0], rtol=1e-5)
  theirs = flatten_params(expected[1])
  for path, gradient in flatten_params(ours[1]).items():
    size = np.abs(theirs[path]).max()
    np.testing.assert_allclose(gradient, theirs[path], atol=3e-5 * size + 1e-6, err_msg=path)


def test_a_row_that_does_not_divide_over_the_devices_is_computed_by_all():
  """Such as that of a shared prefix."""
  layer, mesh, x = make_layer(), make_mesh(2, 1, 2, expert=2), normal(0, 1, 16, 32)
  ours, theirs = (jax.jit(lambda x, m=m: layer(x, None, m))(x) for m in (mesh, None))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)


def test_a_mesh_must_divide_the_experts():
  with pytest.raises(UserError, match='mesh axis expert=8 does not divide dimension 6'):
    config = dataclasses.replace(CONFIG, experts=Experts(6, 2, 40))
    param_shardings(abstract_model(config)[1], make_mesh(1, expert=8))


def test_adapters_are_for_attention_and_dense_layers():
  def adapted(modules):
    paths = flatten_params(lora.abstract_model(MIXTURE, lora.LoraConfig(2, 4.0, modules))[1])
    return {path.split('/adapter')[0] for path in paths if 'adapter' in path}

  assert len(adapted('attention')) == 12 and len(adapted('layers/1/mlp')) == 3
  for modules in ('mlp', 'router', 'experts/up'):
    with pytest.raises(UserError, match='the layers of experts cannot have adapters'):
      adapted(modules)


def test_a_token_has_no_more_experts_than_there_are():
  with pytest.raises(UserError, match='has 3 experts, but a layer has 2'):
    Experts(2, 3, 8)


def test_the_limit_of_experts_is_positive():
  with pytest.raises(UserError, match='limit of experts is 0.0'):
    Experts(2, 1, 8, limit=0.0)
