"""Parts of layers: norms, linear layers and embeddings.

`cai_jax.model.transformer` defines the axis letters.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from cai_jax.model.config import ModelConfig
from cai_jax.model.elementwise import layer_norm, rms_norm
from cai_jax.model.precision import PRODUCT, einsum_f32, sum_entries
from cai_jax.model.quantized.kernel import multiply


class RMSNorm(nnx.Module):
  """Root-mean-square norm with a scale (Zhang and Sennrich 2019), computed in f32.

  Args:
    size: D, size of the axis.
    eps: added to the mean square.
    param_dtype: dtype of the scale.
    offset: added to the scale, which starts at 1 - offset.
    scaled: whether there is a scale; without one it is 1.
  """

  def __init__(self, size: int, eps: float, param_dtype, offset: float = 0.0, scaled: bool = True):
    scale = jnp.full((size,), 1 - offset, param_dtype)
    self.scale = nnx.Param(scale) if scaled else None
    self.eps = eps
    self.offset = offset

  def __call__(self, x: jax.Array, ordered: bool = False) -> jax.Array:
    """Normalize the last axis of x [...,D]; the result has the dtype of x.

    Args:
      x: [...,D].
      ordered: whether the sum has an order that does not depend on the other axes. The sampler
        needs this, and training does without, because its gradient would be slower.
    """
    scale = jnp.ones(x.shape[-1]) if self.scale is None else self.scale[...]
    if self.offset:
      scale = scale.astype(jnp.float32) + self.offset
    if not ordered:
      return rms_norm(x, scale, self.eps)
    y = x.astype(jnp.float32)
    mean = sum_entries(y * y)[..., None] / x.shape[-1]
    y = y * jax.lax.rsqrt(mean + self.eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nnx.Module):
  """Layer norm with a scale and a bias (Ba et al. 2016), computed in f32.

  Args:
    size: D, size of the axis.
    eps: added to the variance.
    param_dtype: dtype of the parameters.
  """

  def __init__(self, size: int, eps: float, param_dtype):
    self.scale = nnx.Param(jnp.ones((size,), param_dtype))
    self.bias = nnx.Param(jnp.zeros((size,), param_dtype))
    self.eps = eps

  def __call__(self, x: jax.Array, ordered: bool = False) -> jax.Array:
    """Normalize the last axis of x [...,D]; see `RMSNorm.__call__`."""
    total = sum_entries if ordered else None
    return layer_norm(x, self.scale[...], self.bias[...], self.eps, total)


Norm = RMSNorm | LayerNorm


def make_norm(config: ModelConfig, param_dtype, size: int | None = None) -> Norm:
  """Return a norm of the form that a model uses.

  Args:
    config: the shape of the model.
    param_dtype: dtype of the parameters.
    size: size of the axis; None means `d_model`.
  """
  size = config.d_model if size is None else size
  if config.norm == 'layer':
    return LayerNorm(size, config.norm_eps, param_dtype)
  return RMSNorm(size, config.norm_eps, param_dtype, config.norm_offset)


class Adapter(nnx.Module):
  """A low-rank term `scale · x · A · B` that is added to a linear layer (Hu et al. 2021).

  Args:
    kernel_shape: shape of the layer's kernel.
    num_outs: number of trailing axes of the kernel that are outputs.
    rank: inner size of A [I,rank] and B [rank,O].
    scale: factor of the term.
    rngs: `rngs.params` draws A; B is zero.
  """

  def __init__(
    self, kernel_shape: tuple[int, ...], num_outs: int, rank: int, scale: float, rngs: nnx.Rngs
  ):
    ins, outs = math.prod(kernel_shape[:-num_outs]), math.prod(kernel_shape[-num_outs:])
    self.a = nnx.Param(ins**-0.5 * jax.random.normal(rngs.params(), (ins, rank)))
    self.b = nnx.Param(jnp.zeros((rank, outs)))
    self.scale = scale

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return f32[X,O] for x [X,I]."""
    low = einsum_f32('XI,IR->XR', x, self.a[...].astype(x.dtype)).astype(x.dtype)
    return self.scale * einsum_f32('XR,RO->XO', low, self.b[...].astype(x.dtype))


class Linear(nnx.Module):
  """A linear layer `x · kernel + bias` that accumulates in f32. The kernel may be quantized.

  Args:
    ins: sizes of the input axes, which are the leading axes of the kernel.
    outs: sizes of the output axes.
    rngs: `rngs.params` draws the kernel with standard deviation gain · fan_in^-1/2.
    param_dtype: dtype of the parameters.
    bias: whether there is a bias; it starts at zero.
    gain: factor of the kernel's standard deviation.
    split_outs: whether the mesh axes that split the tokens also split the outputs of the kernel,
      not its inputs; see `sharding.RULES`.
  """

  def __init__(
    self,
    ins: tuple[int, ...],
    outs: tuple[int, ...],
    rngs: nnx.Rngs,
    param_dtype,
    bias: bool = False,
    gain: float = 1.0,
    split_outs: bool = False,
  ):
    std = gain * math.prod(ins) ** -0.5
    self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (*ins, *outs), param_dtype))
    self.bias = nnx.Param(jnp.zeros(outs, param_dtype)) if bias else None
    self.adapter: Adapter | None = None  # set by cai_jax.model.lora
    self.outs, self.split_outs = outs, split_outs

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return [B,T,*outs] for x [B,T,*ins], in the dtype of x."""
    # The kernel's gradient sums over B and T. With two separate axes, XLA for CPUs first copies a
    # transposed array.
    flat = x.reshape(math.prod(x.shape[:2]), -1)
    rounds = self.adapter is None and self.bias is None
    kernel, outs = self.kernel.get_value(), math.prod(self.outs)
    y = multiply(flat, kernel, outs, rounds, self.split_outs)
    if self.adapter is not None:
      y = y + self.adapter(flat)
    y = y.reshape(*x.shape[:2], *self.outs)
    if self.bias is not None:
      y = y + self.bias[...].astype(jnp.float32)
    return checkpoint_name(y.astype(x.dtype), PRODUCT)


class Embedding(nnx.Module):
  """A table [V,D] of the embeddings of tokens or positions, or the output layer.

  Args:
    size: V, number of rows.
    d_model: D.
    rngs: `rngs.params` draws the table with standard deviation D^-1/2.
    param_dtype: dtype of the table.
  """

  def __init__(self, size: int, d_model: int, rngs: nnx.Rngs, param_dtype):
    std = d_model**-0.5
    self.table = nnx.Param(std * jax.random.normal(rngs.params(), (size, d_model), param_dtype))

  def __call__(self, tokens: jax.Array, differentiable: bool) -> jax.Array:
    """Return the embeddings of tokens.

    Args:
      tokens: i32[B,T].
      differentiable: whether to support gradients with respect to the table. False allows a faster
        lookup on CPUs.

    Returns:
      [B,T,D] in the dtype of the table.
    """
    table = self.table[...]
    if differentiable or table.dtype.itemsize != 2:
      return table[tokens]

    def look_up_bits(table):
      # XLA for CPUs converts a whole half-precision table to f32 in order to read a few rows of it.
      rows = jax.lax.bitcast_convert_type(table, jnp.uint16)[tokens]
      return jax.lax.bitcast_convert_type(rows, table.dtype)

    return jax.lax.platform_dependent(table, cpu=look_up_bits, default=lambda table: table[tokens])
