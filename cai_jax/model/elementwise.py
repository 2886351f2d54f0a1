"""Norms, activations and caps of scores, with gradients that CPUs compute fast."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


def _quick_gelu(x):
  return x * jax.nn.sigmoid(1.702 * x)


# Elementwise functions by name; 'gelu' is x · Φ(x), and 'gelu_tanh' and 'gelu_quick' approximate it
# (Hendrycks and Gimpel 2016, section 2).
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  'silu': jax.nn.silu,
  'gelu': functools.partial(jax.nn.gelu, approximate=False),
  'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True),
  'gelu_quick': _quick_gelu,
  'relu': jax.nn.relu,
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """Return x · scale / √(mean(x²) + eps), computed in f32, in the dtype of x.

  This is the root-mean-square norm of Zhang and Sennrich (2019).

  Args:
    x: [...,D]; the mean is over D.
    scale: [D].
    eps: added to the mean.
  """
  return _rms_norm(x, scale, eps)


def _rms_norm(x, scale, eps):
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  return (y * scale.astype(jnp.float32)).astype(x.dtype)


def _rms_norm_fwd(x, scale, eps):
  return _rms_norm(x, scale, eps), (x, scale)


def _rms_norm_bwd(eps, inputs, gradient):
  def default(x, scale, gradient):
    return jax.vjp(lambda x, scale: _rms_norm(x, scale, eps), x, scale)[1](gradient)

  cpu = functools.partial(_pull_back_on_cpu, eps)
  return jax.lax.platform_dependent(*inputs, gradient, cpu=cpu, default=default)


rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)


def _pull_back_on_cpu(eps, x, scale, gradient):
  """Return the gradients of x and scale, with sums of products written as einsums.

  XLA for CPUs computes the same sums ten times as slowly if they are written as a product and a
  sum: the norms then took a quarter of a train step. With r = 1 / √(mean(x²) + eps) and y = x · r,
  the gradient of x is r · (g · scale - y · mean(g · scale · y)).
  """
  y, g = (z.astype(jnp.float32).reshape(-1, z.shape[-1]) for z in (x, gradient))
  size = y.shape[-1]
  r = jax.lax.rsqrt(jnp.einsum('XD,XD->X', y, y) / size + eps)[:, None]
  y = y * r
  scale_gradient = jnp.einsum('XD,XD->D', g, y)
  g = g * scale.astype(jnp.float32)
  mean = jnp.einsum('XD,XD->X', g, y)[:, None] / size
  x_gradient = (r * (g - y * mean)).reshape(x.shape)
  return x_gradient.astype(x.dtype), scale_gradient.astype(scale.dtype)


def layer_norm(
  x: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  eps: float,
  total: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
  """Return (x - mean(x)) · scale / √(var(x) + eps) + bias, in the dtype of x.

  This is the layer norm of Ba et al. (2016), computed in f32.

  Args:
    x: [...,D]; mean and variance are over D.
    scale: [D].
    bias: [D].
    eps: added to the variance.
    total: sums f32[...,D] over D; None leaves the order of the sum to XLA. XLA for CPUs computes an
      einsum faster than a sum, and its gradient too.
  """
  if total is None:
    total = functools.partial(jnp.einsum, '...D->...')
  y = x.astype(jnp.float32)
  y = y - total(y)[..., None] / x.shape[-1]
  variance = total(y * y)[..., None] / x.shape[-1]
  y = y * jax.lax.rsqrt(variance + eps)
  return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
  """Return cap · tanh(x / cap), which lies between -cap and cap (Gemma Team 2024, section 2).

  Args:
    x: of any shape.
    cap: positive.
  """
  return cap * jnp.tanh(x / cap)


def soft_cap_slope(capped: jax.Array, cap: float) -> jax.Array:
  """Return the derivative of `soft_cap`, 1 - tanh², at the x with soft_cap(x, cap) = capped."""
  return 1 - jnp.square(capped / cap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated_activation(name: str, gate: jax.Array, up: jax.Array) -> jax.Array:
  """Return activation(gate) · up, elementwise (Shazeer 2020).

  The backward pass computes the activation again, and is one pass over the arrays. JAX's own stores
  three intermediate results and reads them in several passes.

  Args:
    name: a key of `ACTIVATIONS`.
    gate, up: of the same shape and dtype.
  """
  return ACTIVATIONS[name](gate) * up


def _gated_activation_fwd(name, gate, up):
  return gated_activation(name, gate, up), (gate, up)


def _gated_activation_bwd(name, inputs, gradient):
  gate, up, g = (x.astype(jnp.float32) for x in (*inputs, gradient))
  if name == 'silu':
    share = jax.nn.sigmoid(gate)
    value = gate * share
    by_gate = g * up * (share + value * (1 - share))
  else:
    value, slope = jax.jvp(ACTIVATIONS[name], (gate,), (jnp.ones_like(gate),))
    by_gate = g * up * slope
  return by_gate.astype(inputs[0].dtype), (g * value).astype(inputs[1].dtype)


gated_activation.defvjp(_gated_activation_fwd, _gated_activation_bwd)
