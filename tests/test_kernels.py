"""Attention kernels: they agree with plain attention, and refuse what they cannot compute."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cai_jax.model.attention.kernels import blockwise
from cai_jax.model.attention.kernels.kernel import (
  KERNELS,
  bind_kernel,
  check_kernel,
  check_model,
  check_new_rows,
  choose_kernel,
)
from cai_jax.model.attention.scores import PLAIN, Scores
from cai_jax.model.config import ModelConfig
from cai_jax.model.transformer import abstract_model, init_params
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import make_mesh

pytestmark = pytest.mark.usefixtures('full_optimization')

B, T, N, K, H = 2, 256, 4, 2, 64


def packed_rows():
  """Return q, k, v and segment ids of two packed rows; the second is padded."""
  keys = jax.random.split(jax.random.key(0), 3)
  q = jax.random.normal(keys[0], (B, T, N, H))
  k, v = (jax.random.normal(key, (B, T, K, H)) for key in keys[1:])
  segment_ids = np.ones((B, T), np.int32)
  segment_ids[0, 100:] = 2
  segment_ids[1, 30:180], segment_ids[1, 180:] = 2, 0
  return q, k, v, segment_ids


def attend_in_numpy(q, k, v, segment_ids, window, scores, sinks=None):
  """Return the output of attention in f64, and a function that returns the inputs' gradients."""
  scale, cap = scores.scale or H**-0.5, scores.cap or np.inf
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  k, v = (np.repeat(x, N // K, axis=2) for x in (k, v))
  visible = np.zeros((B, T, T), bool)
  for b in range(B):
    for t in range(T):
      for s in range(max(0, t + 1 - (window or T)), t + 1):
        visible[b, t, s] = segment_ids[b, t] == segment_ids[b, s]
  x = np.einsum('btnh,bsnh->bnts', q, k) * scale
  capped = x if cap == np.inf else cap * np.tanh(x / cap)
  slope = 1 / np.cosh(x / cap) ** 2  # of the cap
  x = np.where(visible[:, None], capped, -np.inf)
  if sinks is not None:  # a key that every query sees, whose value is 0
    x = np.concatenate([x, np.broadcast_to(sinks[:, None, None], (B, N, T, 1))], -1)
    slope = np.concatenate([slope, np.ones((B, N, T, 1))], -1)
    k, v = (np.concatenate([z, np.zeros((B, 1, N, H))], 1) for z in (k, v))
  weights = np.exp(x - x.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)

  def backward(gradient):
    dv = np.einsum('bnts,btnh->bsnh', weights, gradient)
    error = np.einsum('btnh,bsnh->bnts', gradient, v)
    error = weights * (error - (weights * error).sum(-1, keepdims=True))
    by_sinks = () if sinks is None else (error[..., -1].sum((0, 2)),)
    error = error * slope * scale
    dq = np.einsum('bnts,bsnh->btnh', error, k)
    dk = np.einsum('bnts,btnh->bsnh', error, q)
    by_keys = (x[:, :T].reshape(B, T, K, N // K, H).sum(3) for x in (dk, dv))
    return dq, *by_keys, *by_sinks

  return np.einsum('bnts,bsnh->btnh', weights, v), backward


@pytest.mark.parametrize(
  ('name', 'window', 'scores', 'has_sinks'),
  [
    *itertools.product(['xla', 'blocks', 'splash', 'cudnn'], [None, 40], [PLAIN], [False]),
    *itertools.product(['xla', 'blocks', 'splash'], [None, 40], [Scores(0.2, 1.5)], [False]),
    *itertools.product(['xla', 'blocks', 'splash'], [None, 40], [PLAIN], [True]),
    ('cudnn', 40, Scores(0.2), False),
  ],
)
def test_kernels_agree_with_attention_in_numpy(name, window, scores, has_sinks):
  """Outputs and gradients agree. On CPUs, splash is interpreted and cuDNN's call goes to XLA."""
  mesh = make_mesh(1, 2, 2, devices=jax.devices()[:4])
  options = {'splash': {'interpret': True}, 'cudnn': {'implementation': 'xla'}}
  q, k, v, segment_ids = packed_rows()
  real = (segment_ids > 0)[..., None, None]
  kernel = functools.partial(KERNELS[name].attend, scores=scores, **options.get(name, {}))

  sinks = (jnp.array([2.0, -1.0, 6.0, 0.5]),) if has_sinks else ()
  inputs = q, k, v, *sinks

  def attend(q, k, v, *sinks):
    named = {'sinks': sinks[0]} if sinks else {}
    return kernel(q, k, v, segment_ids, window, mesh, **named)

  def weighted(*inputs):
    out = jnp.where(real, attend(*inputs), 0.0)
    return jnp.sum(out * jnp.cos(out)), out

  expected, backward = attend_in_numpy(q, k, v, segment_ids, window, scores, *sinks)
  expected = np.where(real, expected, 0.0)
  loss_gradient = np.where(real, np.cos(expected) - expected * np.sin(expected), 0.0)
  run = jax.jit(jax.value_and_grad(weighted, argnums=range(len(inputs)), has_aux=True))
  (_, out), gradients = run(*inputs)
  np.testing.assert_allclose(out, expected, atol=2e-5)
  for gradient, expected in zip(gradients, backward(loss_gradient), strict=True):
    np.testing.assert_allclose(gradient, expected, atol=2e-4)


@pytest.mark.parametrize('window', [None, 1, 3, 40])
@pytest.mark.parametrize('length', [1, 100, 256, 250, 1000])
def test_pairs_of_tiles_cover_every_visible_key_once(length, window, monkeypatch):
  monkeypatch.setattr(blockwise, 'MIN_TILE', 32)
  size = blockwise.choose_tile(length)
  tiles = -(-length // size)
  assert tiles <= blockwise.TILES and tiles * size - length < tiles  # hardly any padding
  covered = np.zeros((tiles * size, tiles * size), int)
  for i, j in blockwise.tile_pairs(tiles, size, window):
    covered[i * size : (i + 1) * size, j * size : (j + 1) * size] += 1
  positions = np.arange(length)
  distance = positions[:, None] - positions
  visible = (distance >= 0) & (distance < (window or length))
  assert covered.max() == 1 and covered[:length, :length][visible].all()
  # Each pair has a visible key, so nothing is computed in vain.
  kept = np.add.reduceat(
    np.add.reduceat(visible, range(0, length, size), 0), range(0, length, size), 1
  )
  assert (kept > 0).sum() == len(blockwise.tile_pairs(tiles, size, window))


def test_pairs_without_a_common_segment_are_left_out():
  """They are left out if no row needs them, whatever the order of the ids; padding needs none."""
  rows = np.array([[1, 1, 1, 2, 2, 2, 3, 3, 0, 0], [5, 5, 5, 5, 5, 5, 4, 4, 7, 7]], np.int32)
  tiles = jnp.asarray(rows).reshape(2, 5, 2).swapaxes(0, 1)
  pairs, count = blockwise.needed_pairs(blockwise.tile_pairs(5, 2, None), tiles)
  needed = {tuple(pair) for pair in np.asarray(pairs)[: int(count)].tolist()}
  assert needed == {(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (1, 0), (2, 0), (2, 1)}
  assert sorted(map(tuple, np.asarray(pairs).tolist())) == [
    (i, j) for i in range(5) for j in range(i + 1)
  ]


def test_a_row_has_the_same_bits_whatever_segments_the_other_rows_have():
  q, k, v, segment_ids = packed_rows()
  run = jax.jit(lambda ids: blockwise.attend_blockwise(q, k, v, ids, None))
  other = segment_ids.copy()
  other[1] = 1  # now every pair is needed
  np.testing.assert_array_equal(run(segment_ids)[0], run(other)[0])


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_memory_of_blocks_grows_linearly(dtype):
  """By the compiler's own figures, forward and backward; plain attention is the counterexample."""

  def temporary_bytes(name, length):
    def loss(q, k, v, segment_ids):
      out = KERNELS[name].attend(q, k, v, segment_ids, None, None)
      return jnp.sum(out.astype(jnp.float32) ** 2)

    shapes = [jax.ShapeDtypeStruct((1, length, heads, 16), dtype) for heads in (2, 1, 1)]
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    analysis = gradient.lower(*shapes, ids).compile().memory_analysis()
    return analysis.temp_size_in_bytes

  blocks = [temporary_bytes('blocks', length) for length in (2048, 4096, 8192, 16_384)]
  assert blocks[3] - blocks[2] <= 2.1 * (blocks[2] - blocks[1]), blocks
  assert blocks[3] <= 8.4 * blocks[0], blocks
  assert blocks[2] < 8192 * 8192  # not even one byte for each pair of tokens
  assert temporary_bytes('xla', 8192) > 8192 * 8192 * 4  # so the figures do count such arrays


def test_kernels_for_other_devices_are_refused():
  mesh = make_mesh(devices=jax.devices()[:1])
  check_kernel('xla', mesh, 'float32', 100)
  with pytest.raises(UserError, match="no attention kernel named 'flash'"):
    check_kernel('flash', mesh, 'float32', 128)
  with pytest.raises(UserError, match="'splash' runs on TPUs only.*CPUs. Choose 'blocks'"):
    check_kernel('splash', mesh, 'float32', 128)
  with pytest.raises(UserError, match="'cudnn' runs on GPUs only"):
    check_kernel('cudnn', mesh, 'bfloat16', 128)


class FakeMesh:
  """A mesh of one device that this machine does not have."""

  def __init__(self, platform, kind='', capability=''):
    device = {'platform': platform, 'device_kind': kind, 'compute_capability': capability}
    self.devices = np.array([type('Device', (), device)()], object)


H100 = FakeMesh('gpu', 'NVIDIA H100 80GB HBM3', '9.0')
A100 = FakeMesh('gpu', 'NVIDIA A100-SXM4-40GB', '8.0')
T4 = FakeMesh('gpu', 'NVIDIA T4', '7.5')
AMD = FakeMesh('gpu', 'AMD Instinct MI300X', 'gfx942')


@pytest.mark.parametrize(
  ('mesh', 'dtype', 'lengths', 'head_dim', 'expected'),
  [
    (H100, 'bfloat16', [1000], 64, 'cudnn'),
    (H100, 'bfloat16', [1024], 256, 'cudnn'),
    (H100, 'float32', [1024], 64, 'blocks'),
    (H100, 'bfloat16', [1024], 20, 'blocks'),
    (H100, 'bfloat16', [1024, 8200], 64, 'blocks'),
    (A100, 'bfloat16', [1024], 128, 'cudnn'),
    (A100, 'bfloat16', [1024], 256, 'blocks'),
    (T4, 'float16', [1024], 64, 'blocks'),
    (AMD, 'bfloat16', [1024], 64, 'blocks'),
    (FakeMesh('tpu'), 'float32', [256, 1024], 64, 'splash'),
    (FakeMesh('tpu'), 'bfloat16', [256, 1000], 64, 'blocks'),
    (FakeMesh('cpu'), 'bfloat16', [1024], 64, 'blocks'),
  ],
)
def test_auto_is_the_fastest_kernel_that_can_run(mesh, dtype, lengths, head_dim, expected):
  assert choose_kernel(mesh, dtype, lengths, [head_dim]) == expected
  for length in lengths:
    check_kernel(expected, mesh, dtype, length, head_dim)


def test_a_cap_needs_a_kernel_that_supports_it():
  assert choose_kernel(H100, 'bfloat16', [1024], [64], 50.0) == 'blocks'
  assert choose_kernel(FakeMesh('tpu'), 'bfloat16', [1024], [64], 50.0) == 'splash'
  check_kernel('blocks', H100, 'bfloat16', 1024, 64, 50.0)
  message = "'cudnn' cannot cap attention scores, and the model has attention_cap=50.0. Choose"
  with pytest.raises(UserError, match=message):
    check_kernel('cudnn', H100, 'bfloat16', 1024, cap=50.0)


def test_sinks_need_a_kernel_that_has_them():
  assert choose_kernel(H100, 'bfloat16', [1024], [64], sinks=True) == 'blocks'
  assert choose_kernel(FakeMesh('tpu'), 'bfloat16', [1024], [64], sinks=True) == 'splash'
  with pytest.raises(UserError, match="'cudnn' has no sinks.*Choose 'blocks' or 'xla'"):
    check_kernel('cudnn', H100, 'bfloat16', 1024, sinks=True)


def test_the_rules_of_cudnn_for_heads_are_those_of_jax(monkeypatch):
  """So that no model is refused at compile time that 'auto' had promised to run."""
  stablehlo = pytest.importorskip('jax._src.cudnn.fused_attention_stablehlo')
  for mesh in (H100, A100):
    capability = mesh.devices[0].compute_capability
    monkeypatch.setattr(stablehlo, 'check_compute_capability', lambda c, is_=capability: is_ >= c)
    monkeypatch.setattr(stablehlo, 'is_cuda_compute_capability_equal', lambda c: False)
    for head_dim in (4, 8, 20, 64, 72, 128, 136, 192, 256, 264):
      x = jax.ShapeDtypeStruct((1, 128, 2, head_dim), jnp.bfloat16)
      try:
        stablehlo.check_is_flash_attention(x, x, x, 0, 91000, True, True)
        is_supported = True
      except NotImplementedError:
        is_supported = False
      chosen = choose_kernel(mesh, 'bfloat16', [128], [head_dim])
      assert (chosen == 'cudnn') == is_supported, (capability, head_dim)


def test_a_kernel_must_support_the_heads_of_all_layers():
  heads = functools.partial(ModelConfig, 'qwen2', 64, 32, 48, 2, 4, 2, 64, 64)
  check_model('cudnn', A100, 'bfloat16', 128, heads(head_dims=(64, 128)))
  with pytest.raises(UserError, match="'cudnn' on NVIDIA A100.* heads .* up to 128.*have size 256"):
    check_model('cudnn', A100, 'bfloat16', 128, heads(head_dims=(64, 256)))
  with pytest.raises(UserError, match='needs heads .* compute capability of at least 8.0'):
    check_model('cudnn', T4, 'bfloat16', 128, heads())
  with pytest.raises(UserError, match="'cudnn' has no sinks"):
    check_model('cudnn', A100, 'bfloat16', 128, heads(sinks=True))


def test_unsupported_lengths_dtypes_and_arguments_are_refused():
  check_kernel('splash', FakeMesh('tpu'), 'bfloat16', 1024)
  with pytest.raises(UserError, match='multiple of 128 tokens, not 1000'):
    check_kernel('splash', FakeMesh('tpu'), 'bfloat16', 1000)
  with pytest.raises(UserError, match='but not float32'):
    check_kernel('cudnn', FakeMesh('gpu'), 'float32', 1024)
  check_kernel('cudnn', H100, 'bfloat16', 32_768)  # a training that began so continues
  check_new_rows('cudnn', 8192)
  assert choose_kernel(H100, 'bfloat16', [1024, 8200], [64]) == 'blocks'
  with pytest.raises(UserError, match="at most 8,192 tokens, not 8,200. Choose 'blocks'"):
    check_new_rows('cudnn', 8200)
  with pytest.raises(ValueError, match='needs segment_ids'):
    bind_kernel('splash', None, None)


@pytest.mark.parametrize('windows', [(), (8, None, 8)])
def test_plain_attention_uses_masks_that_the_model_computes_once(windows):
  """The kernel 'xla' and attention without a kernel give the same bits from the same masks."""
  config = ModelConfig('qwen2', 64, 32, 48, 3, 4, 2, 8, 64, windows=windows)
  graph, _ = abstract_model(config)
  params = init_params(config, jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (2, 32), 0, 64)
  segment_ids = jnp.array([[1] * 20 + [2] * 12, [1] * 9 + [2] * 15 + [0] * 8])
  positions = jnp.array([[*range(20), *range(12)], [*range(9), *range(15), *range(8)]])

  def hidden(params, attention):
    return nnx.merge(graph, params)(tokens, positions, segment_ids, attention=attention)[0]

  run = jax.jit(hidden, static_argnums=1)
  np.testing.assert_array_equal(run(params, 'xla'), run(params, None))
  # The masks of a forward pass: causal and same segment, once for each different window.
  jaxpr = str(jax.make_jaxpr(lambda params: hidden(params, 'xla'))(params))
  assert jaxpr.count('bool[2,32,32] = eq') == 2  # one for CPUs and one for other platforms
