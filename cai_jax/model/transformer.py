"""The decoder-only transformer of the Llama family (Touvron et al. 2023), in Flax NNX.

Axes: B batch, T query, S key, D model, N heads, K kv heads, G heads of a kv head, H head, F ffw,
V vocabulary, L layer, X tokens of all rows. Norms, rotary angles, softmax and logits are f32 in any
compute dtype.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding

from cai_jax.model.attention import kernels
from cai_jax.model.attention.softmax import Keys, attend, product, rotary_angles, rotate
from cai_jax.model.cache import (
  Cache,
  LayerCache,
  Packing,
  Prefixes,
  View,
  causal_mask,
  make_view,
  write,
)
from cai_jax.model.config import ModelConfig
from cai_jax.runtime.errors import UserError

# What the backward pass keeps of a block instead of computing it again. Products with parameters
# are found by name: those of half precision have gradients of their own, which hides them.
PRODUCT = 'product'
REMAT = {
  'none': None,  # keeps all
  'dots': jax.checkpoint_policies.save_only_these_names(PRODUCT),
  'full': jax.checkpoint_policies.nothing_saveable,  # but its input
}


def once(compute: Callable[[], Any], positions: jax.Array) -> Any:
  """compute(), whose arrays XLA then does not compute again in each place that uses them.

  A barrier does that, but not on CPUs, where it is gone before operations are fused: each layer
  found the sines of the same angles again, a third of the embedded model's prefill. There they come
  out of a conditional, with which nothing is fused. Its condition always holds, which XLA cannot
  know.
  """

  def conditional():
    zeros = lambda: jax.tree.map(jnp.zeros_like, jax.eval_shape(compute))  # noqa: E731
    return jax.lax.cond(positions.max() < 2**30, compute, zeros)

  return jax.lax.platform_dependent(
    cpu=conditional, default=lambda: jax.lax.optimization_barrier(compute())
  )


class RMSNorm(nnx.Module):
  """Root-mean-square norm with a scale (Zhang and Sennrich 2019), computed in f32."""

  def __init__(self, size: int, eps: float, param_dtype):
    self.scale = nnx.Param(jnp.ones((size,), param_dtype))
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class Adapter(nnx.Module):
  """`scale · x · A · B` f32[X,O] of x [X,I], through a rank r (Hu et al. 2021)."""

  def __init__(self, kernel_shape, num_outs, rank, scale, rngs):
    ins, outs = math.prod(kernel_shape[:-num_outs]), math.prod(kernel_shape[-num_outs:])
    self.a = nnx.Param(ins**-0.5 * jax.random.normal(rngs.params(), (ins, rank)))
    self.b = nnx.Param(jnp.zeros((rank, outs)))
    self.scale = scale

  def __call__(self, x: jax.Array) -> jax.Array:
    low = product('XI,IR->XR', x, self.a[...].astype(x.dtype)).astype(x.dtype)
    return self.scale * product('XR,RO->XO', low, self.b[...].astype(x.dtype))


class Linear(nnx.Module):
  """`x · kernel + bias` over x's axes from the third on, with f32 accumulation, in x's dtype."""

  def __init__(self, ins, outs, rngs, param_dtype, bias=False, gain=1.0):
    std = gain * math.prod(ins) ** -0.5
    self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (*ins, *outs), param_dtype))
    self.bias = nnx.Param(jnp.zeros(outs, param_dtype)) if bias else None
    self.adapter = None  # cai_jax.model.lora may put one here
    self.outs = outs

  def __call__(self, x: jax.Array) -> jax.Array:
    # As one plain matrix: a kernel with two axes to sum over would be copied at every call.
    matrix = self.kernel[...].astype(x.dtype).reshape(-1, math.prod(self.outs))
    # Rows and places as one axis: the kernel's gradient sums over both, and where these are two,
    # XLA for CPUs copies a transposed array for it.
    flat = x.reshape(-1, matrix.shape[0])
    y = product('XI,IO->XO', flat, matrix)
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

    self.query, self.key, self.value = projection(n), projection(k), projection(k)
    # Residual branches start small, so that depth does not change the stream's scale.
    gain = (2 * config.num_layers) ** -0.5
    self.output = Linear((n, h), (d,), rngs, param_dtype, config.output_bias, gain)
    self.q_norm = RMSNorm(h, config.norm_eps, param_dtype) if config.qk_norm else None
    self.k_norm = RMSNorm(h, config.norm_eps, param_dtype) if config.qk_norm else None

  def __call__(
    self,
    x: jax.Array,
    angles: tuple[jax.Array, jax.Array],
    view: View,
    cache: tuple[LayerCache, ...] | None,
    packing: Packing | None,
    prefixes: Sequence[LayerCache],
    kernel: Callable[..., jax.Array] | None,
  ) -> tuple[jax.Array, tuple[LayerCache, ...] | None]:
    q, k, v = self.query(x), self.key(x), self.value(x)
    if self.q_norm is not None:
      q, k = self.q_norm(q), self.k_norm(k)
    q, k = rotate(q, angles), rotate(k, angles)
    if kernel is not None:
      return self.output(kernel(q, k, v)), None
    if cache is None:
      own = LayerCache(k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3))
      return self.output(attend(q, [Keys(own, *view.own)])), None
    cache = tuple(
      write(old, packing, index, k, v) for old, index in zip(cache, view.index, strict=True)
    )
    shared = [Keys(*part) for part in zip(prefixes, view.shared, strict=True)]
    spans = zip(cache, view.own, view.live, strict=True)
    parts = [*shared, *(Keys(span, mask, packing, live) for span, mask, live in spans)]
    if packing is None:
      return self.output(attend(q, parts)), cache
    return self.output(packing.tokens(attend(packing.pieces(q, None), parts))), cache


class MLP(nnx.Module):
  """SwiGLU feed-forward (Shazeer 2020)."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs, param_dtype):
    d, f = config.d_model, config.d_ff
    self.gate = Linear((d,), (f,), rngs, param_dtype)
    self.up = Linear((d,), (f,), rngs, param_dtype)
    gain = (2 * config.num_layers) ** -0.5
    self.down = Linear((f,), (d,), rngs, param_dtype, gain=gain)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
  """One pre-norm layer."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs, param_dtype):
    self.attention_norm = RMSNorm(config.d_model, config.norm_eps, param_dtype)
    self.attention = Attention(config, rngs, param_dtype)
    self.mlp_norm = RMSNorm(config.d_model, config.norm_eps, param_dtype)
    self.mlp = MLP(config, rngs, param_dtype)

  def __call__(self, x, angles, *rest):
    out, cache = self.attention(self.attention_norm(x), angles, *rest)
    x = x + out
    return x + self.mlp(self.mlp_norm(x)), cache


class Embedding(nnx.Module):
  """A table [V,D], read by token on the way in or multiplied by on the way out."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs, param_dtype):
    shape = (config.vocab_size, config.d_model)
    std = config.d_model**-0.5
    self.table = nnx.Param(std * jax.random.normal(rngs.params(), shape, param_dtype))

  def __call__(self, tokens: jax.Array, gradient: bool) -> jax.Array:
    """[B,T,D] of tokens i32[B,T], in the table's dtype; differentiable only with `gradient`."""
    table = self.table[...]
    if gradient or table.dtype.itemsize != 2:
      return table[tokens]

    def bits(table):
      # XLA for CPUs makes all of a half-precision table f32 to read a few rows of it.
      whole = jax.lax.bitcast_convert_type(table, jnp.uint16)[tokens]
      return jax.lax.bitcast_convert_type(whole, table.dtype)

    return jax.lax.platform_dependent(table, cpu=bits, default=lambda table: table[tokens])


class Transformer(nnx.Module):
  """A causal language model. `model(tokens, positions)` gives hidden states, `unembed` logits."""

  def __init__(
    self, config: ModelConfig, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32
  ):
    self.config = config
    self.dtype = dtype
    self.embed = Embedding(config, rngs, param_dtype)
    self.layers = nnx.List([Block(config, rngs, param_dtype) for _ in range(config.num_layers)])
    self.norm = RMSNorm(config.d_model, config.norm_eps, param_dtype)
    self.head = None if config.tied_embeddings else Embedding(config, rngs, param_dtype)

  def __call__(
    self,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array | None = None,
    cache: Cache | None = None,
    packing: Packing | None = None,
    prefixes: Prefixes | None = None,
    sharding: NamedSharding | None = None,
    remat: str = 'none',
    attention: str = 'xla',
  ) -> tuple[jax.Array, Cache | None]:
    """Hidden states [B,T,D] after the last norm, in the compute dtype, and the cache written to.

    Args:
      tokens: i32[B,T].
      positions: i32[B,T], from 0 in each sequence. With a cache, those of a row follow each other
        without a gap, and a negative one marks padding: that token is written nowhere.
      segment_ids: i32[B,T], for packed or padded rows: a token sees only its own segment. Not
        together with a cache.
      cache: keys and values of the tokens at positions before, or None to attend to `tokens` alone.
        Its spans reach as far as any token's position.
      packing: the cache's rows that `tokens` continue; None where there is one row for each of B.
      prefixes: what rows begin with that is not in their cache. A row's positions count it.
      sharding: of the hidden states between blocks. Without it they would come to lie as the
        parameters do, split over D, and each device would compute every row's logits.
      remat: what of a block's activations the backward pass computes again, by a name of `REMAT`;
        without a cache only.
      attention: by a name of `kernels.KERNELS`; others than 'xla' are for packed rows on a mesh.
    """
    if cache is not None and segment_ids is not None:
      raise UserError('segment_ids are for packed rows without a cache: pass one of the two.')
    if cache is None and (prefixes is not None or packing is not None):
      raise UserError('prefixes and packing say how tokens go on from a cache: pass one too.')

    def place(x):
      return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)

    kernel = kernels.bind(attention, segment_ids, sharding and sharding.mesh)

    def before_layers():
      views = [None] * len(self.layers)
      if kernel is None:
        views = self._views(positions, segment_ids, cache, packing, prefixes)
      return rotary_angles(self.config, positions), views

    angles, views = once(before_layers, positions)
    x = place(self.embed(tokens, gradient=cache is None).astype(self.dtype))
    new_cache = []
    for layer, block in enumerate(self.layers):
      old = None if cache is None else cache[layer]
      shared = () if prefixes is None else [entry.cache[layer][0] for entry in prefixes.entries]

      own = kernel and functools.partial(kernel, window=self.config.window(layer))

      # A closure, as modules are no pytrees; what it closes over is differentiated all the same.
      def run(x, old, block=block, view=views[layer], shared=shared, own=own):
        return block(x, angles, view, old, packing, shared, own)

      if remat != 'none' and cache is None:
        run = jax.checkpoint(run, policy=REMAT[remat])
      x, written = run(x, old)
      x = place(x)
      new_cache.append(written)
    return self.norm(x), None if cache is None else tuple(new_cache)

  def _views(self, positions, segment_ids, cache, packing, prefixes) -> list[View]:
    """Each layer's View; layers of one window and cache length have theirs in common."""
    same = None if segment_ids is None else segment_ids[:, :, None] == segment_ids[:, None, :]
    if prefixes is None:
      prefixes = Prefixes((), jnp.full(positions.shape[: 1 if packing is None else 2], -1))

    @functools.cache
    def view(window, lengths):
      if not lengths:
        return View((), (causal_mask(positions, positions, window, same),), (None,), ())
      return make_view(positions, prefixes, packing, lengths, window)

    layers = [() if cache is None else cache[i] for i in range(len(self.layers))]
    lengths = [tuple(span.k.shape[-1] for span in layer) for layer in layers]
    return [view(self.config.window(i), sizes) for i, sizes in enumerate(lengths)]

  def unembed(self, hidden: jax.Array) -> jax.Array:
    """Logits f32[...,V] of hidden states [...,D]."""
    return product('...D,VD->...V', hidden, self.output_table.astype(hidden.dtype))

  @property
  def output_table(self) -> jax.Array:
    """The output layer's table [V,D], in the dtype of the parameters."""
    return (self.embed if self.head is None else self.head).table[...]
