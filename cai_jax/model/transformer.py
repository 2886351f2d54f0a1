"""The decoder-only transformer of the Llama family (Touvron et al. 2023), in Flax NNX.

Axes: B batch, T query, S key, D model, N heads, K kv heads, G heads of a kv head, H head, F ffw,
V vocabulary, L layer; of packed tokens: B groups, R pieces of a group, C tokens of a piece. Norms,
rotary angles, softmax and logits are f32 in any compute dtype.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from cai_jax.model.config import ModelConfig

SPAN = 128  # tokens of a cache that are read or left out together, at least
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
  """Keys and values of a span of one layer's tokens.

  Keys lie transposed: both products of a decode step then read memory in order.
  """

  k: jax.Array  # [B,K,H,S]
  v: jax.Array  # [B,K,S,H]


# The spans of each layer, written in place, never stacked. The i-th token that a row owns lies at
# index i, modulo the length of all spans together. Layers that attend to everything have room for
# all of a row's tokens, and do not read spans that no row has come to. Windowed layers are rings of
# one span.
Cache = tuple[tuple[LayerCache, ...], ...]
Lengths = tuple[tuple[int, ...], ...]  # tokens of each layer's spans


class Prefix(NamedTuple):
  """A sequence of tokens that many rows begin with: their caches hold what comes after it."""

  cache: Cache  # of one row, B = 1, and one span a layer
  length: jax.Array  # i32[], tokens; the rest of the cache is padding


class Prefixes(NamedTuple):
  """The prefixes at hand, and the one that each row begins with."""

  entries: tuple[Prefix, ...]
  of_row: jax.Array  # i32[B], or i32[B,T] of packed tokens: an index of `entries`; -1 is none

  def lengths(self) -> jax.Array:
    """i32, as `of_row`: the position of the first token that each row owns."""
    if not self.entries:
      return jnp.zeros_like(self.of_row)
    lengths = jnp.stack([prefix.length for prefix in self.entries])
    return jnp.where(self.of_row < 0, 0, lengths[self.of_row])


class Packing(NamedTuple):
  """Which rows of a cache T tokens continue, where those of several rows lie side by side.

  Products with parameters take the tokens as they are, with no padding between them. Attention
  takes them in R pieces, each of up to C tokens of one row. The B parts of the tokens belong to B
  equal parts of the cache's rows, so that a mesh that splits both has nothing to send.
  """

  rows: jax.Array  # i32[B,T], each token's row in its part of the cache
  index: jax.Array  # i32[B,R,C], which of the T tokens lie in a piece; T is none
  place: jax.Array  # i32[B,T], where each token lies in its part's R × C

  def pieces(self, x: jax.Array, filler) -> jax.Array:
    """[BR,C,...]: the pieces of x [B,T,...]; where there is no token, `filler`, or anything."""
    b, r, c = self.index.shape
    found = _take(x, self.index.reshape(b, -1)).reshape(b * r, c, *x.shape[2:])
    if filler is None:
      return found
    return jnp.where(self.index.reshape(b * r, c) < x.shape[1], found, filler)

  def tokens(self, pieces: jax.Array) -> jax.Array:
    """[B,T,...] of pieces [BR,C,...]."""
    b, r, c = self.index.shape
    return _take(pieces.reshape(b, r * c, *pieces.shape[2:]), self.place)

  def piece_rows(self) -> jax.Array:
    """i32[B,R]: each piece's row in its part of the cache; 0 for one without tokens."""
    return self.pieces(self.rows, 0)[:, 0].reshape(self.index.shape[:2])

  def latest(self, positions: jax.Array) -> jax.Array:
    """i32[BR]: the last of positions i32[B,T] in each piece's row, be it in another piece."""
    same = self.rows[:, None, :] == self.piece_rows()[:, :, None]
    return jnp.where(same, positions[:, None, :], -1).max(-1).reshape(-1)

  def split(self, x: jax.Array) -> jax.Array:
    """[B,rows/B,...]: the parts of a cache's array [rows,...]."""
    return x.reshape(len(self.rows), -1, *x.shape[1:])

  def read(self, span: LayerCache) -> LayerCache:
    """The span with the row of each piece, [BR,...]."""
    rows = self.piece_rows()
    take = lambda x: _take(self.split(x), rows).reshape(-1, *x.shape[1:])  # noqa: E731
    # Behind a barrier, or XLA for TPUs changes the layout of the whole cache to read a few rows.
    return jax.lax.optimization_barrier(jax.tree.map(take, span))


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
  """x [B,N,...] at index i32[B,M] of its second axis."""
  return jax.vmap(lambda x, index: x.at[index].get(mode='clip'))(x, index)


def spans(length: int, count: int) -> tuple[int, ...]:
  """Tokens of each span of a cache in `count` of them, fewer where it is short."""
  size = max(SPAN, -(-length // (16 * count)) * 16)
  return tuple(min(size, length - start) for start in range(0, length, size))


def cache_lengths(config: ModelConfig, length: int, slack: int, count: int = 1) -> Lengths:
  """Tokens of each layer's spans: `length` in `count`, or its window and `slack` more in one."""

  def layer(window):
    if window is None or window + slack >= length:
      return spans(length, count)
    return (window + slack,)

  return tuple(layer(config.window(i)) for i in range(config.num_layers))


def init_cache(config: ModelConfig, batch: int, lengths: Lengths, dtype) -> Cache:
  """An empty cache for `batch` rows; lengths are tokens of each layer's spans."""

  def span(length):
    k = (batch, config.num_kv_heads, config.head_dim, length)
    v = (batch, config.num_kv_heads, length, config.head_dim)
    return LayerCache(jnp.zeros(k, dtype), jnp.zeros(v, dtype))

  return tuple(tuple(map(span, layer)) for layer in lengths)


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


def causal_mask(
  q_positions: jax.Array, k_positions: jax.Array, window: int | None, same: jax.Array | None
) -> jax.Array:
  """bool[B,T,S]: key not after the query, within the window, and where `same` bool[B,T,S]."""
  distance = q_positions[:, :, None] - k_positions[:, None, :]
  mask = distance >= 0
  if window is not None:
    mask &= distance < window
  return mask if same is None else mask & same


class View(NamedTuple):
  """What the layers of one window and cache need to know of where things lie.

  Masks are of pieces where tokens are packed: [BR,C,S] instead of [B,T,S].
  """

  index: tuple[jax.Array, ...]  # i32[B,T], where tokens go in each span; S is nowhere
  own: tuple[jax.Array, ...]  # bool[B,T,S], what queries see of each span, or of their batch
  live: tuple[jax.Array | None, ...]  # bool[], of each span: whether to look at it; None is yes
  shared: tuple[jax.Array, ...]  # bool[B,T,S], what they see of each prefix


def make_view(
  positions: jax.Array,
  prefixes: Prefixes,
  packing: Packing | None,
  lengths: tuple[int, ...],
  window: int | None,
) -> View:
  """The View of layers whose spans hold so many tokens each.

  Args:
    positions: i32[B,T]; a negative one marks padding.
    prefixes: what lies before.
    packing: of the tokens; None where each of the B is a row of the cache.
    lengths: of the spans.
    window: of the layers, in tokens.
  """
  length, lows = sum(lengths), [sum(lengths[:i]) for i in range(len(lengths))]
  starts = prefixes.lengths()
  places = (positions - (starts[:, None] if packing is None else starts)) % length
  places = jnp.where(positions < 0, length, places)

  if packing is None:
    queries, latest, of_row = positions, positions.max(1), prefixes.of_row
  else:
    queries, latest = packing.pieces(positions, -1), packing.latest(positions)
    of_row = packing.pieces(prefixes.of_row, -1)[:, 0]
  start = Prefixes(prefixes.entries, of_row).lengths()[:, None]
  # Of all tokens that have lain at a place, the latest that a row has come to lies there now.
  last = latest[:, None] - start
  held = last - (last - jnp.arange(length)) % length
  own = causal_mask(queries, held + start, window, (held >= 0)[:, None])

  def shared(number, prefix):
    place = jnp.arange(prefix.cache[0][0].k.shape[-1])[None]
    mine = (of_row == number)[:, None] & (place < prefix.length)
    return causal_mask(queries, place, window, mine[:, None])

  index, parts, live = [], [], []
  for low, size in zip(lows, lengths, strict=True):
    index.append(jnp.where((places >= low) & (places < low + size), places - low, size))
    parts.append(own[:, :, low : low + size])
    live.append(parts[-1].any() if low else None)
  others = [shared(number, prefix) for number, prefix in enumerate(prefixes.entries)]
  return View(tuple(index), tuple(parts), tuple(live), tuple(others))


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
  """`x · kernel + bias` over x's axes from the third on, with f32 accumulation, in x's dtype."""

  def __init__(self, ins, outs, rngs, param_dtype, bias=False, gain=1.0):
    std = gain * math.prod(ins) ** -0.5
    self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (*ins, *outs), param_dtype))
    self.bias = nnx.Param(jnp.zeros(outs, param_dtype)) if bias else None
    self.outs = outs

  def __call__(self, x: jax.Array) -> jax.Array:
    # As one plain matrix: a kernel with two axes to sum over would be copied at every call.
    matrix = self.kernel[...].astype(x.dtype).reshape(-1, math.prod(self.outs))
    y = product('BTI,IO->BTO', x.reshape(*x.shape[:2], -1), matrix)
    y = y.reshape(*x.shape[:2], *self.outs)
    if self.bias is not None:
      y = y + self.bias[...].astype(jnp.float32)
    return y.astype(x.dtype)


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
  ) -> tuple[jax.Array, tuple[LayerCache, ...] | None]:
    q, k, v = self.query(x), self.key(x), self.value(x)
    if self.q_norm is not None:
      q, k = self.q_norm(q), self.k_norm(k)
    q, k = rotate(q, angles), rotate(k, angles)
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


def write(
  cache: LayerCache, packing: Packing | None, index: jax.Array, k: jax.Array, v: jax.Array
) -> LayerCache:
  """A span with k, v [B,T,K,H] written at index i32[B,T] of their rows; S is nowhere."""

  def put(cache, rows, index, k, v):
    return LayerCache(
      cache.k.at[rows, :, :, index].set(k.astype(cache.k.dtype), mode='drop'),
      cache.v.at[rows, :, index].set(v.astype(cache.v.dtype), mode='drop'),
    )

  if packing is None:
    return put(cache, jnp.arange(len(k))[:, None], index, k, v)
  parts = jax.vmap(put)(jax.tree.map(packing.split, cache), packing.rows, index, k, v)
  return jax.tree.map(lambda new, old: new.reshape(old.shape), parts, cache)


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

  def __call__(self, x, angles, view, cache, packing, prefixes):
    out, cache = self.attention(self.attention_norm(x), angles, view, cache, packing, prefixes)
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
    remat: bool = False,
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
      remat: compute a block again in the backward pass instead of keeping its activations; without
        a cache only.
    """
    if cache is not None and segment_ids is not None:
      raise ValueError('segment_ids are for packed rows without a cache: pass one of the two.')
    if cache is None and (prefixes is not None or packing is not None):
      raise ValueError('prefixes and packing say how tokens go on from a cache: pass one too.')

    def place(x):
      return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)

    def before_layers():
      views = self._views(positions, segment_ids, cache, packing, prefixes)
      return rotary_angles(self.config, positions), views

    angles, views = once(before_layers, positions)
    x = place(self.embed(tokens, gradient=cache is None).astype(self.dtype))
    new_cache = []
    for layer, block in enumerate(self.layers):
      old = None if cache is None else cache[layer]
      shared = () if prefixes is None else [entry.cache[layer][0] for entry in prefixes.entries]

      # A closure, as modules are no pytrees; what it closes over is differentiated all the same.
      def run(x, old, block=block, view=views[layer], shared=shared):
        return block(x, angles, view, old, packing, shared)

      x, written = (jax.checkpoint(run) if remat and cache is None else run)(x, old)
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
    table = (self.embed if self.head is None else self.head).table[...].astype(hidden.dtype)
    return product('...D,VD->...V', hidden, table)
