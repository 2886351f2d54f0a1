"""Gradients of products, norms and activations agree with JAX's; CPUs compute products in bf16."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cai_jax.model.elementwise import ACTIVATIONS, gated_activation, layer_norm, rms_norm
from cai_jax.model.precision import _pull_back_turned, einsum_f32, sum_entries

EQUATIONS = {  # → shapes of the factors
  'XI,IO->XO': ((24, 16), (16, 8)),
  'BTD,VD->BTV': ((2, 12, 16), (40, 16)),
  'BKRH,BKSH->BKRS': ((2, 3, 8, 16), (2, 3, 12, 16)),
  'BKRS,BKSH->BKRH': ((2, 3, 8, 12), (2, 3, 12, 16)),
  '...D,VD->...V': ((2, 12, 16), (40, 16)),
}


def factors(shapes, dtype):
  keys = jax.random.split(jax.random.key(0), len(shapes))
  return [
    jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)
  ]


@pytest.mark.parametrize('equation', EQUATIONS)
def test_gradients_of_half_precision_products_agree_with_f32(equation):
  x, y = factors(EQUATIONS[equation], jnp.bfloat16)

  def pull_back(product, x, y):
    out, backward = jax.vjp(functools.partial(product, equation), x, y)
    cotangent = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    # Rounded, so that only the products differ.
    return backward(cotangent.astype(jnp.bfloat16).astype(jnp.float32))

  ours = jax.jit(functools.partial(pull_back, einsum_f32))(x, y)
  exact = pull_back(jnp.einsum, x.astype(jnp.float32), y.astype(jnp.float32))
  for gradient, expected in zip(ours, exact, strict=True):
    assert gradient.dtype == jnp.bfloat16
    scale = np.abs(expected).max()
    np.testing.assert_allclose(gradient, expected, rtol=2**-8, atol=1e-5 * scale)


def test_the_gradient_that_tpus_compute_for_a_split_last_axis_is_the_same():
  (x, w), (cotangent,) = (
    factors(EQUATIONS['XI,IO->XO'], jnp.bfloat16),
    factors(((24, 8),), 'bfloat16'),
  )
  ours = jax.jit(functools.partial(_pull_back_turned, 'XI,IO->XO'))(x, w, cotangent)
  expected = jax.vjp(functools.partial(jnp.einsum, 'XI,IO->XO'), x, w)[1](cotangent)
  for gradient, other in zip(ours, expected, strict=True):
    assert gradient.dtype == other.dtype and gradient.shape == other.shape
    np.testing.assert_allclose(
      gradient.astype(jnp.float32), other.astype(jnp.float32), rtol=2**-7, atol=1e-2
    )


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='is about XLA for CPUs')
def test_cpus_compute_gradients_of_bf16_products_in_bf16():
  """XLA for CPUs multiplies bf16 factors in f32, at half the speed, unless they have a form."""
  x, w = factors(((512, 576), (576, 1536)), jnp.bfloat16)

  def factor_dtypes(product):
    def loss(x, w):
      return jnp.sum(jnp.sin(product('XI,IO->XO', x, w).astype(jnp.float32)))

    text = jax.jit(jax.grad(loss, (0, 1))).lower(x, w).compile().as_text()
    dtypes = set()
    for computation in text.split('\n\n'):
      types = dict(re.findall(r'%([\w.\-]+) = (\w+)\[', computation))
      for operands in re.findall(r' dot\(([^)]*)\)', computation):
        dtypes |= {types[name] for name in re.findall(r'%([\w.\-]+)', operands)}
    return dtypes

  assert factor_dtypes(einsum_f32) == {'bf16'}
  assert 'f32' in factor_dtypes(jnp.einsum)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('shape', [(2, 24, 32), (2, 6, 4, 32)])
def test_gradients_of_the_norm_agree_with_jax(shape, dtype):
  x, g = factors((shape, shape), dtype)
  (scale,) = factors(((shape[-1],),), jnp.float32)

  def definition(x, scale):
    y = x.astype(jnp.float32)
    return (scale * y / jnp.sqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-5)).astype(x.dtype)

  out, backward = jax.vjp(lambda x, scale: rms_norm(x, scale, 1e-5), x, scale)
  expected, pull_back = jax.vjp(definition, x, scale)
  tolerance = 2e-6 if dtype == 'float32' else 2**-7
  np.testing.assert_allclose(*(z.astype(jnp.float32) for z in (out, expected)), rtol=tolerance)
  for ours, theirs in zip(backward(g), pull_back(g), strict=True):
    assert ours.dtype == theirs.dtype
    ours, theirs = (np.asarray(z, np.float32) for z in (ours, theirs))
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * np.abs(theirs).max())


@pytest.mark.parametrize('ordered', [False, True])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_layer_norm_and_its_gradients_agree_with_torch(dtype, ordered):
  torch = pytest.importorskip('torch')
  x, g = factors(((2, 24, 33),) * 2, dtype)
  scale, bias = factors(((33,),) * 2, jnp.float32)
  x = x + 2
  total = sum_entries if ordered else None
  out, backward = jax.vjp(lambda *args: layer_norm(*args, 1e-5, total), x, scale, bias)
  assert out.dtype == x.dtype
  theirs = [torch.tensor(np.asarray(z, np.float64), requires_grad=True) for z in (x, scale, bias)]
  expected = torch.nn.functional.layer_norm(theirs[0], (33,), *theirs[1:], 1e-5)
  expected.backward(torch.tensor(np.asarray(g, np.float64)))
  tolerance = 2e-6 if dtype == 'float32' else 2**-7
  pairs = [(out, expected.detach()), *zip(backward(g), (z.grad for z in theirs), strict=True)]
  for ours, wanted in pairs:
    ours, wanted = np.asarray(ours, np.float32), wanted.numpy()
    np.testing.assert_allclose(ours, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())


def test_activations_are_those_of_torch():
  torch = pytest.importorskip('torch')
  x = np.linspace(-6, 6, 97)
  t, f = torch.tensor(x), torch.nn.functional
  expected = {
    'silu': f.silu(t),
    'gelu': f.gelu(t),
    'gelu_tanh': f.gelu(t, approximate='tanh'),
    'gelu_quick': t * torch.sigmoid(1.702 * t),
    'relu': f.relu(t),
  }
  assert expected.keys() == ACTIVATIONS.keys()
  for name, wanted in expected.items():
    ours = ACTIVATIONS[name](jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(ours, wanted.numpy(), atol=1e-6, err_msg=name)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', ACTIVATIONS)
def test_gradients_of_the_gated_activation_agree_with_jax(name, dtype):
  gate, up, g = (3 * x for x in factors([(4, 8, 32)] * 3, dtype))

  def definition(gate, up):
    return ACTIVATIONS[name](gate.astype(jnp.float32)) * up.astype(jnp.float32)

  out, backward = jax.vjp(functools.partial(gated_activation, name), gate, up)
  expected, pull_back = jax.vjp(definition, gate, up)
  assert out.dtype == gate.dtype
  tolerance = 1e-6 if dtype == 'float32' else 2**-6
  scale = np.abs(np.asarray(expected)).max()
  np.testing.assert_allclose(out.astype(np.float32), expected, rtol=tolerance, atol=1e-3 * scale)
  for ours, theirs in zip(backward(g), pull_back(g.astype(jnp.float32)), strict=True):
    ours, theirs = (np.asarray(z, np.float32) for z in (ours, theirs))
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * np.abs(theirs).max())
