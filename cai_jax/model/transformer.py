"""The decoder-only transformer of the Llama family (Touvron et al. 2023), in Flax NNX.

Axes: B batch, T query, S key, D model, N heads, K kv heads, G heads of a kv head, H head, F ffw,
V vocabulary, L layer. Norms, rotary angles, softmax and logits are f32 in any compute dtype.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from cai_jax.model.config import ModelConfig

MASKED = -1e30  # finite, so that a row with no key at all gives a number instead of NaN


def product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """Einsum of two arrays of one dtype, accumulated in f32 and given in f32."""
  if x.dtype == jnp.float32:
    # Without this the factors are rounded to TF32 on GPUs and to bf16 on TPUs.
    return jnp.einsum(equation, x, y, precision=jax.lax.Precision.HIGHEST)
  return _half_product(equation, x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _half_product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """`product` of bf16 or f16 arrays, whose gradients are products of arrays of that dtype too.

  The result is f32 since CPUs are over twice as fast at that as at a bf16 result, and since scores
  and logits are wanted so. Its cotangent then is f32: left as it is, every product of the backward
  pass would be one of f32 with bf16, which accelerators compute at the speed of f32.
  """
  return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _half_product_fwd(equation, x, y):
  return _half_product(equation, x, y), (x, y)


def _half_product_bwd(equation, factors, cotangent):
  _, pull = jax.vjp(functools.partial(jnp.einsum, equation), *factors)
  return pull(cotangent.astype(factors[0].dtype))


_half_product.defvjp(_half_product_fwd, _half_product_bwd)


class LayerCache(NamedTuple):
  """Keys and values of one layer; index S of a row holds the token at position S.

  Keys lie transposed: both products of a decode step then read memory in order.
  """

  k: jax.Array  # [B,K,H,S]
  v: jax.Array  # [B,K,S,H]


Cache = tuple[LayerCache, ...]  # one entry a layer: written in place, never stacked


def init_cache(config: ModelConfig, batch: int, length: int, dtype) -> Cache:
  """An empty cache for `batch` rows of up to `length` tokens."""
  k = (batch, config.num_kv_heads, config.head_dim, length)
  v = (batch, config.num_kv_heads, length, config.head_dim)
  return tuple(
    LayerCache(jnp.zeros(k, dtype), jnp.zeros(v, dtype)) for _ in range(config.num_layers)
  )


def rotary_angles(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(cos, sin) f32[B,T,H/2] of rotary embeddings (Su et al. 2021) at positions i32[B,T]."""
  half = config.head_dim // 2
  frequency = config.rope_theta ** -(jnp.arange(half, dtype=jnp.float32) / half)
  if config.rope_scaling is not None:
    s = config.rope_scaling
    # Waves longer than the original context are slowed by `factor`, short ones kept, and those
    # between are interpolated (Llama 3.1's scheme).
    turns = s.original_max_positions * frequency / (2 * jnp.pi)
    keep = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    keep = jnp.clip(keep, 0.0, 1.0)
    frequency = frequency * (keep + (1.0 - keep) / s.factor)
  angle = positions[..., None].astype(jnp.float32) * frequency
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
  """x [B,T,N,H] with each pair (h, h + H/2) turned by its angle; result in x's dtype."""
  cos, sin = (a[:, :, None, :] for a in angles)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.astype(x.dtype)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
  """Output [B,T,N,H] of q [B,T,N,H] over k [B,K,H,S] and v [B,K,S,H] where mask bool[B,T,S]."""
  b, t, n, h = q.shape
  heads = k.shape[1]
  # The queries that share a kv head are rows R of one matrix: XLA makes a plain batch of matrix
  # products of that, five to nine times as fast in decode on a CPU as with T and G as axes, which
  # CPUs refuse in bf16 altogether.
  rows = q.reshape(b, t, heads, -1, h).swapaxes(1, 2).swapaxes(2, 3).reshape(b, heads, -1, h)
  scores = product('BKRH,BKHS->BKRS', rows, k).reshape(b, heads, -1, t, k.shape[-1])
  scores = jnp.where(mask[:, None, None], scores * h**-0.5, MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  out = product('BKRS,BKSH->BKRH', weights.reshape(b, heads, -1, k.shape[-1]), v)
  out = out.reshape(b, heads, -1, t, h).swapaxes(2, 3).swapaxes(1, 2)
  return out.reshape(b, t, n, h).astype(q.dtype)


def causal_mask(
  q_positions: jax.Array, k_positions: jax.Array, window: int | None, same: jax.Array | None
) -> jax.Array:
  """bool[B,T,S]: key not after the query, within the window, and where `same` bool[B,T,S]."""
  distance = q_positions[:, :, None] - k_positions[:, None, :]
  mask = distance >= 0
  if window is not None:
    mask &= distance < window
  return mask if same is None else mask & same


class RMSNorm(nnx.Module):
  """Root-mean-square norm with a scale (Zhang and Sennrich 2019), computed in f32."""

  def __init__(self, size: int, eps: float, param_dtype):
    self.scale = nnx.Param(jnp.ones((size,), param_dtype))
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class Linear(nnx.Module):
  """`einsum(equation, x, kernel) + bias`, with f32 accumulation and the result in x's dtype."""

  def __init__(self, equation, shape, fan_in, rngs, param_dtype, bias_shape=None, gain=1.0):
    std = gain * fan_in**-0.5
    self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape, param_dtype))
    self.bias = None if bias_shape is None else nnx.Param(jnp.zeros(bias_shape, param_dtype))
    self.equation = equation

  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.kernel[...].astype(x.dtype)
    y = product(self.equation, x, kernel)
    if self.bias is not None:
      y = y + self.bias[...].astype(jnp.float32)
    return y.astype(x.dtype)


class Attention(nnx.Module):
  """Grouped-query attention (Ainslie et al. 2023) with rotary positions."""

  def __init__(self, config: ModelConfig, layer: int, rngs: nnx.Rngs, param_dtype):
    d, n, k, h = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim
    bias = config.qkv_bias

    def projection(heads):
      shape, bias_shape = (d, heads, h), (heads, h) if bias else None
      return Linear('BTD,DNH->BTNH', shape, d, rngs, param_dtype, bias_shape)

    self.query, self.key, self.value = projection(n), projection(k), projection(k)
    # Residual branches start small, so that depth does not change the stream's scale.
    self.output = Linear(
      'BTNH,NHD->BTD',
      (n, h, d),
      n * h,
      rngs,
      param_dtype,
      (d,) if config.output_bias else None,
      gain=(2 * config.num_layers) ** -0.5,
    )
    self.q_norm = RMSNorm(h, config.norm_eps, param_dtype) if config.qk_norm else None
    self.k_norm = RMSNorm(h, config.norm_eps, param_dtype) if config.qk_norm else None
    self.window = config.window(layer)

  def __call__(self, x, positions, angles, same, cache: LayerCache | None, rows):
    q, k, v = self.query(x), self.key(x), self.value(x)
    if self.q_norm is not None:
      q, k = self.q_norm(q), self.k_norm(k)
    q, k = rotate(q, angles), rotate(k, angles)
    if cache is None:
      mask = causal_mask(positions, positions, self.window, same)
      k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
      return self.output(attend(q, k, v, mask)), None
    places = (jnp.arange(x.shape[0]) if rows is None else rows)[:, None]
    cache = LayerCache(
      cache.k.at[places, :, :, positions].set(k.astype(cache.k.dtype), mode='drop'),
      cache.v.at[places, :, positions].set(v.astype(cache.v.dtype), mode='drop'),
    )
    k, v = cache if rows is None else (cache.k[rows], cache.v[rows])
    mask = causal_mask(positions, jnp.arange(k.shape[-1])[None], self.window, None)
    return self.output(attend(q, k.astype(q.dtype), v.astype(q.dtype), mask)), cache


class MLP(nnx.Module):
  """SwiGLU feed-forward (Shazeer 2020)."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs, param_dtype):
    d, f = config.d_model, config.d_ff
    self.gate = Linear('BTD,DF->BTF', (d, f), d, rngs, param_dtype)
    self.up = Linear('BTD,DF->BTF', (d, f), d, rngs, param_dtype)
    gain = (2 * config.num_layers) ** -0.5
    self.down = Linear('BTF,FD->BTD', (f, d), f, rngs, param_dtype, gain=gain)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
  """One pre-norm layer."""

  def __init__(self, config: ModelConfig, layer: int, rngs: nnx.Rngs, param_dtype):
    self.attention_norm = RMSNorm(config.d_model, config.norm_eps, param_dtype)
    self.attention = Attention(config, layer, rngs, param_dtype)
    self.mlp_norm = RMSNorm(config.d_model, config.norm_eps, param_dtype)
    self.mlp = MLP(config, rngs, param_dtype)

  def __call__(self, x, positions, angles, same, cache, rows):
    out, cache = self.attention(self.attention_norm(x), positions, angles, same, cache, rows)
    x = x + out
    return x + self.mlp(self.mlp_norm(x)), cache


class Embedding(nnx.Module):
  """A table [V,D], read by token on the way in or multiplied by on the way out."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs, param_dtype):
    shape = (config.vocab_size, config.d_model)
    std = config.d_model**-0.5
    self.table = nnx.Param(std * jax.random.normal(rngs.params(), shape, param_dtype))


class Transformer(nnx.Module):
  """A causal language model. `model(tokens, positions)` gives hidden states, `unembed` logits."""

  def __init__(
    self, config: ModelConfig, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32
  ):
    self.config = config
    self.dtype = dtype
    self.embed = Embedding(config, rngs, param_dtype)
    self.layers = nnx.List(
      [Block(config, layer, rngs, param_dtype) for layer in range(config.num_layers)]
    )
    self.norm = RMSNorm(config.d_model, config.norm_eps, param_dtype)
    self.head = None if config.tied_embeddings else Embedding(config, rngs, param_dtype)

  def __call__(
    self,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array | None = None,
    cache: Cache | None = None,
    rows: jax.Array | None = None,
    sharding: NamedSharding | None = None,
    remat: bool = False,
  ) -> tuple[jax.Array, Cache | None]:
    """Hidden states [B,T,D] after the last norm, in the compute dtype, and the cache written to.

    Args:
      tokens: i32[B,T].
      positions: i32[B,T], from 0 in each sequence. With a cache they are also the places written
        to, and a position at or past the cache's length marks padding: it is written nowhere.
      segment_ids: i32[B,T], for packed or padded rows: a token sees only its own segment. Not
        together with a cache.
      cache: keys and values of the tokens at positions before, or None to attend to `tokens` alone.
      rows: i32[B], the cache's rows that `tokens` continue; None where they are all of them.
      sharding: of the hidden states between blocks. Without it they would come to lie as the
        parameters do, split over D, and each device would compute every row's logits.
      remat: compute a block again in the backward pass instead of keeping its activations; without
        a cache only.
    """
    if cache is not None and segment_ids is not None:
      raise ValueError('segment_ids are for packed rows without a cache: pass one of the two.')

    def place(x):
      return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)

    def apply(block, x, old):
      return block(x, positions, angles, same, old, rows)

    x = place(self.embed.table[...][tokens].astype(self.dtype))
    angles = rotary_angles(self.config, positions)
    same = None if segment_ids is None else segment_ids[:, :, None] == segment_ids[:, None, :]
    new_cache = []
    for layer, block in enumerate(self.layers):
      old = None if cache is None else cache[layer]
      # A closure, as modules are no pytrees; what it closes over is differentiated all the same.
      run = functools.partial(apply, block)
      x, written = (jax.checkpoint(run) if remat and cache is None else run)(x, old)
      x = place(x)
      new_cache.append(written)
    return self.norm(x), None if cache is None else tuple(new_cache)

  def unembed(self, hidden: jax.Array) -> jax.Array:
    """Logits f32[...,V] of hidden states [...,D]."""
    table = (self.embed if self.head is None else self.head).table[...].astype(hidden.dtype)
    return product('...D,VD->...V', hidden, table)
