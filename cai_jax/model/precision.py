"""Products and sums with a fixed precision and a fixed order."""

import functools

import jax
import jax.numpy as jnp


def einsum_f32(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """Return the einsum of two arrays of the same dtype, accumulated and returned in f32.

  Args:
    equation: such as 'BTD,VD->BTV'.
    x: the first factor.
    y: the second factor, of the same dtype.
  """
  if x.dtype == jnp.float32:
    # At the default precision, GPUs round f32 factors to TF32 and TPUs round them to bf16.
    return jnp.einsum(equation, x, y, precision=jax.lax.Precision.HIGHEST)
  return _half_einsum(equation, x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _half_einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """`einsum_f32` for bf16 or f16 factors, with a backward pass in their dtype.

  The result is f32 because scores and logits need it, and because CPUs compute an f32 result more
  than twice as fast as a bf16 one. JAX's own gradient would multiply the f32 cotangent with bf16
  factors, which accelerators do at f32 speed. The backward pass therefore rounds it first.
  """
  return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _half_einsum_fwd(equation, x, y):
  return _half_einsum(equation, x, y), (x, y)


def _half_einsum_bwd(equation, factors, cotangent):
  _, pullback = jax.vjp(functools.partial(jnp.einsum, equation), *factors)
  return pullback(cotangent.astype(factors[0].dtype))


_half_einsum.defvjp(_half_einsum_fwd, _half_einsum_bwd)


def sum_entries(x: jax.Array) -> jax.Array:
  """Sum f32[...,N] over its last axis.

  On CPUs, the order of XLA's own sum depends on the other axes, and so on the number of rows. There
  this function adds the two halves until one entry is left. That is as fast as XLA's sum, and
  faster for a masked array.
  """

  def halves(x):
    while x.shape[-1] > 1:
      odd = x.shape[-1] % 2
      x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)]) if odd else x
      x = x[..., : x.shape[-1] // 2] + x[..., x.shape[-1] // 2 :]
    return x[..., 0]

  return jax.lax.platform_dependent(x, cpu=halves, default=lambda x: x.sum(-1))
