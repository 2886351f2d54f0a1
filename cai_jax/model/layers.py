"""The layers of the transformer. `cai_jax.model.transformer` defines the axis letters."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from cai_jax.model.attention.rotary import Angles, rotate
from cai_jax.model.cache import LayerCache
from cai_jax.model.config import ModelConfig
from cai_jax.model.elementwise import rms_norm, swiglu
from cai_jax.model.precision import einsum_f32, sum_entries

PRODUCT = 'product'  # checkpoint name of every product with parameters, for rematerialization


class LayerContext(NamedTuple):
  """How a block attends.

  Attributes:
    angles: cosines and sines from `rotary_angles`; None in a layer that rotates nothing.
    attend: returns the attention output [B,T,N,H] of q [B,T,N,H], k and v [B,T,K,H], rotated. With
      a cache it also takes the layer's blocks, and returns the output and the updated blocks.
  """

  angles: Angles | None
  attend: Callable[..., Any]


class RMSNorm(nnx.Module):
  """Root-mean-square norm with a scale (Zhang and Sennrich 2019), computed in f32."""

  def __init__(self, size: int, eps: float, param_dtype):
    self.scale = nnx.Param(jnp.ones((size,), param_dtype))
    self.eps = eps

  def __call__(self, x: jax.Array, ordered: bool = False) -> jax.Array:
    """Normalize the last axis of x [...,D]; the result has the dtype of x.

    Args:
      x: [...,D].
      ordered: whether the sum has an order that does not depend on the other axes. The sampler
        needs this, and training does without, because its gradient would be slower.
    """
    if not ordered:
      return rms_norm(x, self.scale[...], self.eps)
    y = x.astype(jnp.float32)
    mean = sum_entries(y * y)[..., None] / x.shape[-1]
    y = y * jax.lax.rsqrt(mean + self.eps)
    return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


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
  """A linear layer `x · kernel + bias` that accumulates in f32.

  Args:
    ins: sizes of the input axes, which are the leading axes of the kernel.
    outs: sizes of the output axes.
    rngs: `rngs.params` draws the kernel with standard deviation gain · fan_in^-1/2.
    param_dtype: dtype of the parameters.
    bias: whether there is a bias; it starts at zero.
    gain: factor of the kernel's standard deviation.
  """

  def __init__(
    self,
    ins: tuple[int, ...],
    outs: tuple[int, ...],
    rngs: nnx.Rngs,
    param_dtype,
    bias: bool = False,
    gain: float = 1.0,
  ):
    std = gain * math.prod(ins) ** -0.5
    self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (*ins, *outs), param_dtype))
    self.bias = nnx.Param(jnp.zeros(outs, param_dtype)) if bias else None
    self.adapter: Adapter | None = None  # set by cai_jax.model.lora
    self.outs = outs

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return [B,T,*outs] for x [B,T,*ins], in the dtype of x."""
    # A kernel with two input axes would be copied at every call; as one matrix it is not.
    matrix = self.kernel[...].astype(x.dtype).reshape(-1, math.prod(self.outs))
    # The kernel's gradient sums over B and T. With two separate axes, XLA for CPUs first copies a
    # transposed array.
    flat = x.reshape(-1, matrix.shape[0])
    y = einsum_f32('XI,IO->XO', flat, matrix)
    if self.adapter is not None:
      y = y + self.adapter(flat)
    y = y.reshape(*x.shape[:2], *self.outs)
    if self.bias is not None:
      y = y + self.bias[...].astype(jnp.float32)
    return checkpoint_name(y.astype(x.dtype), PRODUCT)


class Attention(nnx.Module):
  """Grouped-query attention (Ainslie et al. 2023) with rotary positions."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs, param_dtype):
    d, n, k, h = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim

    def projection(heads):
      return Linear((d,), (heads, h), rngs, param_dtype, bias=config.qkv_bias)

    self.rope_interleaved = config.rope_interleaved
    self.query, self.key, self.value = projection(n), projection(k), projection(k)
    # Residual branches start small, so that depth does not change the scale of the residual stream.
    gain = (2 * config.num_layers) ** -0.5
    self.output = Linear((n, h), (d,), rngs, param_dtype, config.output_bias, gain)
    self.q_norm = RMSNorm(h, config.norm_eps, param_dtype) if config.qk_norm else None
    self.k_norm = RMSNorm(h, config.norm_eps, param_dtype) if config.qk_norm else None

  def __call__(
    self, x: jax.Array, cache: tuple[LayerCache, ...] | None, context: LayerContext
  ) -> tuple[jax.Array, tuple[LayerCache, ...] | None]:
    """Return the output [B,T,D] and the updated blocks of the cache.

    Args:
      x: [B,T,D].
      cache: the layer's blocks, or None to attend to the tokens of `x` alone.
      context: how to attend.
    """
    q, k, v = self.query(x), self.key(x), self.value(x)
    if self.q_norm is not None and self.k_norm is not None:
      q, k = (norm(x, cache is not None) for norm, x in ((self.q_norm, q), (self.k_norm, k)))
    q, k = (rotate(x, context.angles, self.rope_interleaved) for x in (q, k))
    if cache is None:
      return self.output(context.attend(q, k, v)), None
    out, cache = context.attend(q, k, v, cache)
    return self.output(out), cache


class MLP(nnx.Module):
  """A SwiGLU feed-forward layer (Shazeer 2020): down(silu(gate(x)) · up(x))."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs, param_dtype):
    d, f = config.d_model, config.d_ff
    self.gate = Linear((d,), (f,), rngs, param_dtype)
    self.up = Linear((d,), (f,), rngs, param_dtype)
    gain = (2 * config.num_layers) ** -0.5
    self.down = Linear((f,), (d,), rngs, param_dtype, gain=gain)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return [B,T,D] for x [B,T,D]."""
    return self.down(swiglu(self.gate(x), self.up(x)))


class Block(nnx.Module):
  """One pre-norm transformer layer."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs, param_dtype):
    self.attention_norm = RMSNorm(config.d_model, config.norm_eps, param_dtype)
    self.attention = Attention(config, rngs, param_dtype)
    self.mlp_norm = RMSNorm(config.d_model, config.norm_eps, param_dtype)
    self.mlp = MLP(config, rngs, param_dtype)

  def __call__(
    self, x: jax.Array, cache: tuple[LayerCache, ...] | None, context: LayerContext
  ) -> tuple[jax.Array, tuple[LayerCache, ...] | None]:
    """Return [B,T,D] and the updated blocks of the cache; see `Attention.__call__`."""
    ordered = cache is not None
    out, cache = self.attention(self.attention_norm(x, ordered), cache, context)
    x = x + out
    return x + self.mlp(self.mlp_norm(x, ordered)), cache


class Embedding(nnx.Module):
  """A table [V,D] of token embeddings, or the output layer that multiplies with it."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs, param_dtype):
    shape = (config.vocab_size, config.d_model)
    std = config.d_model**-0.5
    self.table = nnx.Param(std * jax.random.normal(rngs.params(), shape, param_dtype))

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
