"""Attention: products, rotary positions, masks, and one softmax over keys that lie in parts.

Axes are those of transformer.py.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cai_jax.model.cache import LayerCache, Packing
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


class Keys(NamedTuple):
  """Keys and values that queries attend to, and which of them each query sees."""

  kv: LayerCache  # k [B,K,H,S] and v [B,K,S,H]; B = 1 where all rows share them
  mask: jax.Array  # bool[B,T,S]
  packing: Packing | None = None  # that finds the rows of `kv`, for queries of pieces
  live: jax.Array | None = None  # bool[]; if it is false no query sees any, and none are read


class Partial(NamedTuple):
  """A softmax over some of the keys, not yet divided by its sum; R queries of a kv head."""

  top: jax.Array  # f32[B,K,R,1], the greatest score
  total: jax.Array  # f32[B,K,R,1], sum of exp(score - top)
  out: jax.Array  # f32[B,K,R,H], values weighted by it


def attend(q: jax.Array, parts: Sequence[Keys]) -> jax.Array:
  """Output [B,T,N,H] of one softmax of q [B,T,N,H] over all keys of all parts.

  Parts are merged by their log-sum-exp. Keys that a query does not see add exact zeros, so it makes
  no difference to any bit whether a part is read of which another query sees something.
  """
  b, t, n, h = q.shape
  heads = parts[0].kv.v.shape[1]
  # The queries that share a kv head are rows R of one matrix: XLA makes a plain batch of matrix
  # products of that, five to nine times as fast in decode on a CPU as with T and G as axes, which
  # CPUs refuse in bf16 altogether.
  rows = q.reshape(b, t, heads, -1, h).swapaxes(1, 2).swapaxes(2, 3).reshape(b, heads, -1, h)

  def times(x, keys):
    """x [B,K,R,A] times keys [B,K,A,C], which are read once where all rows share them."""
    x = x.astype(keys.dtype)
    if keys.shape[0] == b:
      return product('BKRA,BKAC->BKRC', x, keys)
    joined = product('KRA,KAC->KRC', x.swapaxes(0, 1).reshape(heads, -1, x.shape[-1]), keys[0])
    return joined.reshape(heads, b, -1, keys.shape[-1]).swapaxes(0, 1)

  def read(part):
    k, v = part.kv if part.packing is None else part.packing.read(part.kv)
    x = times(rows, k).reshape(b, heads, -1, t, k.shape[-1])
    x = jnp.where(part.mask[:, None, None], x * h**-0.5, MASKED)
    x = x.reshape(b, heads, -1, k.shape[-1])
    top = jax.lax.stop_gradient(x.max(-1, keepdims=True))
    x = jnp.exp(x - top)
    return Partial(top, x.sum(-1, keepdims=True), times(x, v))

  def nothing():
    none = jnp.full((*rows.shape[:3], 1), MASKED, jnp.float32)
    return Partial(none, jnp.zeros_like(none), jnp.zeros(rows.shape, jnp.float32))

  def found(part):
    if part.live is None:
      return read(part)
    return jax.lax.cond(part.live, lambda: read(part), nothing)

  partials = [found(part) for part in parts]
  if len(partials) == 1:
    total, out = partials[0][1:]
  else:
    top = functools.reduce(jnp.maximum, [p.top for p in partials])
    scales = [jnp.exp(p.top - top) for p in partials]
    total = sum(p.total * scale for p, scale in zip(partials, scales, strict=True))
    out = sum(p.out * scale for p, scale in zip(partials, scales, strict=True))
  out = (out / total).reshape(b, heads, -1, t, h).swapaxes(2, 3).swapaxes(1, 2)
  return out.reshape(b, t, n, h).astype(q.dtype)
