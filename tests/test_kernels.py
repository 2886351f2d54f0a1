"""Attention by kernels: what plain XLA gives, or an error where one cannot run."""

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
from cai_jax.runtime.mesh import make_mesh

B, T, N, K, H = 2, 256, 4, 2, 64


def packed():
  """q, k, v and segments of two rows, the second one padded."""
  keys = jax.random.split(jax.random.key(0), 3)
  q = jax.random.normal(keys[0], (B, T, N, H))
  k, v = (jax.random.normal(key, (B, T, K, H)) for key in keys[1:])
  segments = np.ones((B, T), np.int32)
  segments[0, 100:] = 2
  segments[1, 30:180], segments[1, 180:] = 2, 0
  return q, k, v, segments


def plain(q, k, v, segments, window):
  place = jnp.broadcast_to(jnp.arange(T), (B, T))
  same = segments[:, :, None] == segments[:, None, :]
  mask = causal_mask(place, place, window, same)
  return attend(q, [KeyBlock(LayerCache.from_tokens(k, v), mask)])


@pytest.mark.parametrize('window', [None, 40])
@pytest.mark.parametrize('name', ['xla', 'blocks', 'splash', 'cudnn'])
def test_a_kernel_gives_what_plain_attention_gives(name, window):
  """On CPUs: splash attention interpreted, and the call of cuDNN's by XLA's implementation."""
  mesh = make_mesh(1, 2, 2, devices=jax.devices()[:4])
  options = {'splash': {'interpret': True}, 'cudnn': {'implementation': 'xla'}}
  q, k, v, segments = packed()
  real = (segments > 0)[..., None, None]
  kernel = functools.partial(KERNELS[name].attend, **options.get(name, {}))

  def run(attend):
    def weighted(q, k, v):
      out = jnp.where(real, attend(q, k, v), 0.0)
      return jnp.sum(out * jnp.cos(out)), out

    return jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))(q, k, v)

  (_, expected), slopes = run(lambda q, k, v: plain(q, k, v, segments, window))
  (_, found), others = run(lambda q, k, v: kernel(q, k, v, segments, window, mesh))
  np.testing.assert_allclose(found, expected, atol=2e-5)
  for one, other in zip(slopes, others, strict=True):
    np.testing.assert_allclose(other, one, atol=2e-4)


@pytest.mark.parametrize('window', [None, 3, 40])
@pytest.mark.parametrize('length', [1, 100, 256, 250])
def test_blocks_cover_just_what_is_seen(length, window, monkeypatch):
  monkeypatch.setattr(blockwise, 'MIN_BLOCK', 32)
  seen = np.zeros((length, length), bool)
  for queries, keys in blockwise.split_blocks(length, window):
    assert not seen[queries].any()
    seen[queries, keys] = True
  place = np.arange(length)
  distance = place[:, None] - place
  needed = (distance >= 0) & (distance < (window or length))
  assert seen[needed].all()
  assert seen.any(1).all() and len(blockwise.split_blocks(length, window)) <= blockwise.MAX_BLOCKS


def test_names_that_cannot_run_here_are_errors():
  mesh = make_mesh(devices=jax.devices()[:1])
  check_kernel('xla', mesh, 'float32', 100)
  with pytest.raises(ValueError, match="no attention kernel named 'flash'"):
    check_kernel('flash', mesh, 'float32', 128)
  with pytest.raises(ValueError, match="'splash' runs on TPUs only.*CPUs. Choose 'blocks'"):
    check_kernel('splash', mesh, 'float32', 128)
  with pytest.raises(ValueError, match="'cudnn' runs on GPUs only"):
    check_kernel('cudnn', mesh, 'bfloat16', 128)


class FakeMesh:
  """A mesh of devices that are not here."""

  def __init__(self, platform):
    device = type('Device', (), {'platform': platform})()
    self.devices = np.array([device], object)


def test_what_kernels_cannot_take_is_an_error():
  check_kernel('splash', FakeMesh('tpu'), 'bfloat16', 1024)
  with pytest.raises(ValueError, match='multiple of 128 tokens, not 1000'):
    check_kernel('splash', FakeMesh('tpu'), 'bfloat16', 1000)
  with pytest.raises(ValueError, match='not in float32'):
    check_kernel('cudnn', FakeMesh('gpu'), 'float32', 1024)
  with pytest.raises(ValueError, match='needs segment_ids'):
    bind_kernel('splash', None, None)
