"""Products and sums with a fixed precision and a fixed order."""

import functools

import jax
import jax.numpy as jnp

PRODUCT = 'product'  # checkpoint name of every product with parameters, for rematerialization


def einsum_f32(equation: str, x: jax.Array, y: jax.Array, split_last: bool = False) -> jax.Array:
  """Return the einsum of two arrays of the same dtype, accumulated and returned in f32.

  Args:
    equation: such as 'BTD,VD->BTV'.
    x: the first factor.
    y: the second factor, of the same dtype.
    split_last: whether devices that hold different parts of x may each keep a part of the last axis
      of y; see `_pull_back_turned`. It decides how fast gradients are, not what they are.
  """
  if x.dtype == jnp.float32:
    # At the default precision, GPUs round f32 factors to TF32 and TPUs round them to bf16.
    return jnp.einsum(equation, x, y, precision=jax.lax.Precision.HIGHEST)
  return _half_einsum(equation, split_last, x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _half_einsum(equation: str, split_last: bool, x: jax.Array, y: jax.Array) -> jax.Array:
  """`einsum_f32` for bf16 or f16 factors, with a backward pass in their dtype.

  The result is f32 because scores and logits need it, and because CPUs compute an f32 result more
  than twice as fast as a bf16 one. JAX's own gradient would multiply the f32 cotangent with bf16
  factors, which accelerators do at f32 speed. The backward pass therefore rounds it first.
  """
  del split_last  # for the gradients
  return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _half_einsum_fwd(equation, split_last, x, y):
  return _half_einsum(equation, split_last, x, y), (x, y)


def _half_einsum_bwd(equation, split_last, factors, cotangent):
  cotangent = cotangent.astype(factors[0].dtype)

  def default(x, y, cotangent):
    return jax.vjp(functools.partial(jnp.einsum, equation), x, y)[1](cotangent)

  if '...' in equation:
    return default(*factors, cotangent)
  platforms = {'cpu': functools.partial(_pull_back_on_cpu, equation)}
  if split_last:
    platforms['tpu'] = functools.partial(_pull_back_turned, equation)
  return jax.lax.platform_dependent(*factors, cotangent, **platforms, default=default)


_half_einsum.defvjp(_half_einsum_fwd, _half_einsum_bwd)


def einsum_rounded(
  equation: str, x: jax.Array, y: jax.Array, split_last: bool = False
) -> jax.Array:
  """Return the einsum of two arrays of the same dtype, accumulated in f32 and returned in theirs.

  Args:
    equation: such as 'XI,IO->XO'.
    x: the first factor.
    y: the second factor, of the same dtype.
    split_last: as for `einsum_f32`.
  """
  if x.dtype == jnp.float32:
    return einsum_f32(equation, x, y)
  return _rounded_einsum(equation, split_last, x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rounded_einsum(equation: str, split_last: bool, x: jax.Array, y: jax.Array) -> jax.Array:
  """`einsum_rounded` for bf16 or f16 factors; cuBLAS rounds what it writes, which saves a pass."""
  del split_last  # for the gradients

  def on_gpu(x, y):
    return jnp.einsum(equation, x, y, preferred_element_type=x.dtype)

  def default(x, y):
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32).astype(x.dtype)

  return jax.lax.platform_dependent(x, y, cuda=on_gpu, default=default)


def _rounded_einsum_fwd(equation, split_last, x, y):
  return _rounded_einsum(equation, split_last, x, y), (x, y)


_rounded_einsum.defvjp(_rounded_einsum_fwd, _half_einsum_bwd)


def _pull_back_turned(
  equation: str, x: jax.Array, y: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Return the gradients of an einsum of bf16 factors, in a form that XLA for TPUs can scatter.

  The gradient of y is a sum over devices, of which each needs a part. XLA sends only these parts
  if they divide the first axis of the product. Parts of the last axis of a bf16 array are cut from
  the whole sum instead, which every device receives. So this product has the last axis of y first.
  """
  inputs, out = equation.split('->')
  left, right = inputs.split(',')
  turned = jnp.einsum(f'{out},{left}->{right[::-1]}', cotangent, x)
  # Without the barrier, XLA would make one product of the product and the transposition.
  y_grad = jax.lax.optimization_barrier(turned).T
  return jnp.einsum(f'{out},{right}->{left}', cotangent, y), y_grad


def _pull_back_on_cpu(
  equation: str, x: jax.Array, y: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Return the gradients of an einsum of bf16 factors, with the fast products of XLA for CPUs.

  These have an f32 result, and sum over the last axis of a factor. In all other cases XLA converts
  the factors to f32, at half the speed. It makes a sum over two axes into a fast product, with a
  transposed copy. So a sum over an axis that is last in neither factor, as in the gradient of a
  kernel, gets a second axis of size 1.
  """
  inputs, out = equation.split('->')
  left, right = inputs.split(',')

  def product(ins, result, a, b):
    summed = [letter for letter in ins[0] if letter in ins[1] and letter not in result]
    if len(summed) == 1 and not any(letters.endswith(summed[0]) for letters in ins):
      a, b = (
        jnp.expand_dims(z, ins_.index(summed[0])) for z, ins_ in zip((a, b), ins, strict=True)
      )
      ins = [letters.replace(summed[0], f'z{summed[0]}') for letters in ins]
    y = jnp.einsum(f'{ins[0]},{ins[1]}->{result}', a, b, preferred_element_type=jnp.float32)
    return y.astype(x.dtype)

  return product([out, right], left, cotangent, y), product([left, out], right, x, cotangent)


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
