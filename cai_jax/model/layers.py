"""The layers of the transformer. `cai_jax.model.transformer` defines the axis letters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from cai_jax.model.attention.rotary import Angles, rotate
from cai_jax.model.cache import LayerCache
from cai_jax.model.config import DeltaRule, LayerKind, ModelConfig
from cai_jax.model.delta_rule import DeltaInputs, Kernels
from cai_jax.model.elementwise import ACTIVATIONS, gated_activation
from cai_jax.model.experts import MoE, Routing
from cai_jax.model.parts import Embedding, Linear, Norm, RMSNorm, make_norm
from cai_jax.model.precision import PRODUCT, einsum_f32


class LayerContext(NamedTuple):
  """How a block attends.

  Attributes:
    angles: cosines and sines from `rotary_angles`; None in a layer that rotates nothing.
    attend: returns the attention output [B,T,N,H] of q [B,T,N,H], k and v [B,T,K,H], rotated. With
      a cache it also takes the layer's blocks, and returns the output and the updated blocks. A
      model with sinks gives it the keyword `sinks`, f32[N]. In a layer with a gated delta rule, it
      takes `DeltaInputs` and `Kernels` in place of q, k and v.
    growth: f32[B,T], factors of the rotated queries; None means 1.
    real: bool[B,T], false for padding, which experts do not compute; None means no padding.
    mesh: the devices over which experts are split, or None; see `MoE.__call__`.
  """

  angles: Angles | None
  attend: Callable[..., Any]
  growth: jax.Array | None = None
  real: jax.Array | None = None
  mesh: Mesh | None = None


class Attention(nnx.Module):
  """Grouped-query attention (Ainslie et al. 2023) with rotary positions.

  Args:
    config: the shape of the model.
    kind: the kind of the layer.
    rngs: `rngs.params` draws the parameters.
    param_dtype: dtype of the parameters.
  """

  def __init__(self, config: ModelConfig, kind: LayerKind, rngs: nnx.Rngs, param_dtype):
    d, n, k, h = config.d_model, config.num_heads, kind.kv_heads, kind.head_dim

    def projection(heads):
      return Linear((d,), (heads, h), rngs, param_dtype, bias=config.qkv_bias)

    self.rope_interleaved = config.rope_interleaved
    self.query, self.key = projection(n), projection(k)
    self.value = None if kind.values_from_keys else projection(k)
    scaleless = RMSNorm(h, config.norm_eps, param_dtype, scaled=False)
    self.v_norm = scaleless if config.value_norm else None
    self.gate = projection(n) if config.attention_gate else None
    # Residual branches start small, so that depth does not change the scale of the residual stream.
    gain = (2 * config.num_layers) ** -0.5
    self.output = Linear((n, h), (d,), rngs, param_dtype, config.output_bias, gain, True)
    self.sinks = nnx.Param(jnp.zeros(n, param_dtype)) if config.sinks else None
    self.norm_over_heads = config.qk_norm_over_heads

    def head_norm(heads):
      size = heads * h if config.qk_norm_over_heads else h
      return make_norm(config, param_dtype, size) if config.qk_norm else None

    self.q_norm, self.k_norm = head_norm(n), head_norm(k)

  def __call__(
    self, x: jax.Array, cache: tuple[LayerCache, ...] | None, context: LayerContext
  ) -> tuple[jax.Array, tuple[LayerCache, ...] | None]:
    """Return the output [B,T,D] and the updated blocks of the cache.

    Args:
      x: [B,T,D].
      cache: the layer's blocks, or None to attend to the tokens of `x` alone.
      context: how to attend.
    """
    q, k = self.query(x), self.key(x)
    v = k if self.value is None else self.value(x)
    ordered = cache is not None
    if self.v_norm is not None:
      v = self.v_norm(v, ordered)
    if self.q_norm is not None and self.k_norm is not None:
      q, k = self._normalize(self.q_norm, q, ordered), self._normalize(self.k_norm, k, ordered)
    q, k = (rotate(x, context.angles, self.rope_interleaved) for x in (q, k))
    if context.growth is not None:
      q = (q.astype(jnp.float32) * context.growth[..., None, None]).astype(q.dtype)
    sinks = {} if self.sinks is None else {'sinks': self.sinks[...].astype(jnp.float32)}
    if cache is None:
      return self._project(x, context.attend(q, k, v, **sinks)), None
    out, cache = context.attend(q, k, v, cache, **sinks)
    return self._project(x, out), cache

  def _project(self, x: jax.Array, out: jax.Array) -> jax.Array:
    """Return [B,T,D] for the input x [B,T,D] and the result [B,T,N,H] of attention."""
    if self.gate is not None:
      gate = jax.nn.sigmoid(self.gate(x).astype(jnp.float32))
      out = (out.astype(jnp.float32) * gate).astype(out.dtype)
    return self.output(out)

  def _normalize(self, norm: Norm, x: jax.Array, ordered: bool) -> jax.Array:
    """Return queries or keys [B,T,N,H], normalized over H, or over N and H."""
    if not self.norm_over_heads:
      return norm(x, ordered)
    return norm(x.reshape(*x.shape[:2], -1), ordered).reshape(x.shape)


class Convolution(nnx.Module):
  """The weights of a convolution, for each channel those of its last W tokens.

  Args:
    shape: [heads, channels of a head, W].
    rngs: `rngs.params` draws them with standard deviation W^-1/2.
    param_dtype: dtype of the weights.
  """

  def __init__(self, shape: tuple[int, ...], rngs: nnx.Rngs, param_dtype):
    std = shape[-1] ** -0.5
    self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape, param_dtype))


class Decay(nnx.Module):
  """The logarithm of each head's decay, -exp(scale) · softplus(x · kernel + bias), in f32.

  Args:
    d_model: D.
    heads: number of heads.
    rngs: `rngs.params` draws the kernel, and exp(scale) between 0.01 and 16.
    param_dtype: dtype of the parameters.
  """

  def __init__(self, d_model: int, heads: int, rngs: nnx.Rngs, param_dtype):
    std = d_model**-0.5
    self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (d_model, heads), param_dtype))
    rate = jax.random.uniform(rngs.params(), (heads,), param_dtype, 0.01, 16)
    self.scale = nnx.Param(jnp.log(rate))
    self.bias = nnx.Param(jnp.ones((heads,), param_dtype))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return f32[B,T,heads] for x [B,T,D]."""
    y = einsum_f32('XI,IO->XO', x.reshape(-1, x.shape[-1]), self.kernel[...].astype(x.dtype))
    y = checkpoint_name(y, PRODUCT).reshape(*x.shape[:2], -1)
    scale, bias = (z[...].astype(jnp.float32) for z in (self.scale, self.bias))
    return -jnp.exp(scale) * jax.nn.softplus(y + bias)


class GatedDelta(nnx.Module):
  """A layer with a gated delta rule (Yang et al. 2024, figure 1), in place of attention.

  Args:
    config: the shape of the model.
    delta: sizes of the layer.
    rngs: `rngs.params` draws the parameters.
    param_dtype: dtype of the parameters.
  """

  def __init__(self, config: ModelConfig, delta: DeltaRule, rngs: nnx.Rngs, param_dtype):
    d, w = config.d_model, delta.width
    keys, values = (delta.key_heads, delta.key_dim), (delta.value_heads, delta.value_dim)
    project = lambda outs: Linear((d,), outs, rngs, param_dtype)  # noqa: E731
    self.query, self.key, self.value = project(keys), project(keys), project(values)
    self.query_conv = Convolution((*keys, w), rngs, param_dtype)
    self.key_conv = Convolution((*keys, w), rngs, param_dtype)
    self.value_conv = Convolution((*values, w), rngs, param_dtype)
    self.rate = project((delta.value_heads,))
    self.decay = Decay(d, delta.value_heads, rngs, param_dtype)
    self.gate = project(values)
    self.norm = RMSNorm(delta.value_dim, config.norm_eps, param_dtype)
    gain = (2 * config.num_layers) ** -0.5
    self.output = Linear(values, (d,), rngs, param_dtype, gain=gain, split_outs=True)
    self.heads = delta.key_heads

  def __call__(
    self, x: jax.Array, cache: tuple[Any, ...] | None, context: LayerContext
  ) -> tuple[jax.Array, tuple[Any, ...] | None]:
    """Return the output [B,T,D] and the updated blocks of the cache; see `Attention.__call__`."""
    # Value heads are in groups, one for each key head.
    group = lambda x, axis: x.reshape(*x.shape[:axis], self.heads, -1, *x.shape[axis + 1 :])  # noqa: E731
    inputs = DeltaInputs(
      self.query(x),
      self.key(x),
      group(self.value(x), 2),
      group(self.decay(x), 2),
      group(jax.nn.sigmoid(self.rate(x).astype(jnp.float32)), 2),
    )
    kernels = Kernels(
      self.query_conv.kernel[...], self.key_conv.kernel[...], group(self.value_conv.kernel[...], 0)
    )
    if cache is None:
      out, new_cache = context.attend(inputs, kernels), None
    else:
      out, new_cache = context.attend(inputs, kernels, cache)
    out = self.norm(out.reshape(*x.shape[:2], -1, out.shape[-1]), cache is not None)
    out = out * jax.nn.silu(self.gate(x).astype(jnp.float32))
    return self.output(out.astype(x.dtype)), new_cache


class MLP(nnx.Module):
  """A feed-forward layer: down(activation(gate(x)) · up(x)) (Shazeer 2020), or without a gate."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs, param_dtype):
    d, f, bias = config.d_model, config.d_ff, config.mlp_bias
    self.activation = config.activation
    self.gate = Linear((d,), (f,), rngs, param_dtype, bias) if config.gated else None
    self.up = Linear((d,), (f,), rngs, param_dtype, bias)
    gain = (2 * config.num_layers) ** -0.5
    self.down = Linear((f,), (d,), rngs, param_dtype, bias, gain, True)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return [B,T,D] for x [B,T,D]."""
    if self.gate is None:
      return self.down(ACTIVATIONS[self.activation](self.up(x)))
    return self.down(gated_activation(self.activation, self.gate(x), self.up(x)))


class Block(nnx.Module):
  """One transformer layer: attention and a feed-forward layer, with norms before or after each.

  `delta`, a gated delta rule, may take the place of `attention`.

  Args:
    config: the shape of the model.
    kind: the kind of the layer.
    rngs: `rngs.params` draws the parameters.
    param_dtype: dtype of the parameters.
  """

  def __init__(self, config: ModelConfig, kind: LayerKind, rngs: nnx.Rngs, param_dtype):
    def norm(is_used):
      return make_norm(config, param_dtype) if is_used else None

    self.attention_norm = norm(config.pre_norm)
    self.attention = None if kind.delta else Attention(config, kind, rngs, param_dtype)
    self.delta = GatedDelta(config, kind.delta, rngs, param_dtype) if kind.delta else None
    self.attention_post_norm = norm(config.post_norm)
    self.mlp_norm = norm(config.pre_norm)
    self.mlp = (MoE if kind.sparse else MLP)(config, rngs, param_dtype)
    self.mlp_post_norm = norm(config.post_norm)
    self.residual_scale = config.residual_scale
    self.parallel = config.parallel_blocks
    self.scalar = nnx.Param(jnp.ones((), param_dtype)) if config.layer_scalar else None

  def __call__(
    self, x: jax.Array, cache: tuple[LayerCache, ...] | None, context: LayerContext
  ) -> tuple[jax.Array, tuple[LayerCache, ...] | None, Routing | None]:
    """Return [B,T,D], the updated blocks of the cache, and the routing of each row, if any.

    The arguments are those of `Attention.__call__`.
    """

    def normalize(norm, x):
      return x if norm is None else norm(x, cache is not None)

    def add(x, branch, post_norm):
      branch = normalize(post_norm, branch)
      return x + (branch if self.residual_scale == 1 else branch * self.residual_scale)

    mixer: Any = self.delta if self.attention is None else self.attention
    out, new_cache = mixer(normalize(self.attention_norm, x), cache, context)
    result = add(x, out, self.attention_post_norm)
    inputs = x if self.parallel else result
    inputs = normalize(self.mlp_norm, inputs)
    routing = None
    if isinstance(self.mlp, MoE):
      out, routing = self.mlp(inputs, context.real, context.mesh)
    else:
      out = self.mlp(inputs)
    result = add(result, out, self.mlp_post_norm)
    if self.scalar is not None:
      result = result * jax.lax.stop_gradient(self.scalar[...].astype(result.dtype))
    return result, new_cache, routing


def embed_tokens(
  config: ModelConfig,
  embed: Embedding,
  position_embed: Embedding | None,
  tokens: jax.Array,
  positions: jax.Array,
  dtype: Any,
  differentiable: bool,
) -> jax.Array:
  """Return the input [B,T,D] of the first block, in a compute dtype.

  Args:
    config: gives the scale of the embeddings.
    embed: the embeddings of tokens.
    position_embed: those of positions, or None.
    tokens: i32[B,T].
    positions: i32[B,T]; what padding outside the table gets is arbitrary, but finite.
    dtype: the compute dtype.
    differentiable: see `Embedding.__call__`.
  """
  x = embed(tokens, differentiable).astype(dtype)
  if config.embedding_scale != 1:
    x = x * config.embedding_scale
  if position_embed is not None:
    positions = jnp.clip(positions, 0, config.max_positions - 1)
    x = x + position_embed(positions, differentiable).astype(dtype)
  return x
