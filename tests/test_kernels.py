"""Attention kernels: they agree with plain attention, and refuse what they cannot compute."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cai_jax.model.attention.cached import KeyBlock, attend
from cai_jax.model.attention.kernels import blockwise
from cai_jax.model.attention.kernels.kernel import KERNELS, bind_kernel, check_kernel
from cai_jax.model.attention.mask import causal_mask
from cai_jax.model.cache import LayerCache
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import make_mesh

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


def attend_with_mask(q, k, v, segment_ids, window):
  positions = jnp.broadcast_to(jnp.arange(T), (B, T))
  same_segment = segment_ids[:, :, None] == segment_ids[:, None, :]
  mask = causal_mask(positions, positions, window, same_segment)
  return attend(q, [KeyBlock(LayerCache.from_tokens(k, v), mask)])


@pytest.mark.parametrize('window', [None, 40])
@pytest.mark.parametrize('name', ['xla', 'blocks', 'splash', 'cudnn'])
def test_kernels_agree_with_masked_attention(name, window):
  """Outputs and gradients agree. On CPUs, splash is interpreted and cuDNN's call goes to XLA."""
  mesh = make_mesh(1, 2, 2, devices=jax.devices()[:4])
  options = {'splash': {'interpret': True}, 'cudnn': {'implementation': 'xla'}}
  q, k, v, segment_ids = packed_rows()
  real = (segment_ids > 0)[..., None, None]
  kernel = functools.partial(KERNELS[name].attend, **options.get(name, {}))

  def run(attend):
    def weighted(q, k, v):
      out = jnp.where(real, attend(q, k, v), 0.0)
      return jnp.sum(out * jnp.cos(out)), out

    return jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))(q, k, v)

  (_, expected), expected_gradients = run(
    lambda q, k, v: attend_with_mask(q, k, v, segment_ids, window)
  )
  (_, out), gradients = run(lambda q, k, v: kernel(q, k, v, segment_ids, window, mesh))
  np.testing.assert_allclose(out, expected, atol=2e-5)
  for gradient, expected in zip(gradients, expected_gradients, strict=True):
    np.testing.assert_allclose(gradient, expected, atol=2e-4)


@pytest.mark.parametrize('window', [None, 3, 40])
@pytest.mark.parametrize('length', [1, 100, 256, 250])
def test_blocks_cover_every_visible_key_once(length, window, monkeypatch):
  monkeypatch.setattr(blockwise, 'MIN_BLOCK', 32)
  covered = np.zeros((length, length), bool)
  blocks = blockwise.split_blocks(length, window)
  for queries, keys in blocks:
    assert not covered[queries].any()
    covered[queries, keys] = True
  positions = np.arange(length)
  distance = positions[:, None] - positions
  visible = (distance >= 0) & (distance < (window or length))
  assert covered[visible].all()
  assert covered.any(1).all() and len(blocks) <= blockwise.MAX_BLOCKS


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
  """A mesh of one device of a platform that this machine does not have."""

  def __init__(self, platform):
    device = type('Device', (), {'platform': platform})()
    self.devices = np.array([device], object)


def test_unsupported_lengths_dtypes_and_arguments_are_refused():
  check_kernel('splash', FakeMesh('tpu'), 'bfloat16', 1024)
  with pytest.raises(UserError, match='multiple of 128 tokens, not 1000'):
    check_kernel('splash', FakeMesh('tpu'), 'bfloat16', 1000)
  with pytest.raises(UserError, match='but not float32'):
    check_kernel('cudnn', FakeMesh('gpu'), 'float32', 1024)
  with pytest.raises(ValueError, match='needs segment_ids'):
    bind_kernel('splash', None, None)
