"""The gated delta rule (Yang et al. 2024, "Gated Delta Networks"), and its short convolution.

A head keeps a state S [H,U] that maps keys to values. For a token with query q and key k of unit
length, value v, decay α and rate β (ibid., equation 10):

  S ← α S;  S ← S + β k (v - kᵀ S)ᵀ;  output = H^-1/2 qᵀ S

`recur` computes this token by token: its states and outputs depend on nothing but the tokens before
them, to the bit. `recur_in_chunks` computes whole chunks with products of matrices, for training.

Axis letters: B batch, T tokens, C tokens of a chunk, K key heads, G value heads of a key head, H
channels of a key, U channels of a value, W width of the convolution. All arithmetic is f32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cai_jax.model.precision import einsum_f32, sum_entries

CHUNK = 64  # tokens; a power of two
UNIT_EPS = 1e-6  # added to the squared length of queries and keys


class DeltaInputs(NamedTuple):
  """What the gated delta rule gets for each token.

  Attributes:
    q: [B,T,K,H], of any length.
    k: [B,T,K,H], as `q`.
    v: [B,T,K,G,U].
    log_decay: f32[B,T,K,G], the logarithm of α; at most 0.
    beta: f32[B,T,K,G], between 0 and 1. A token with `log_decay` and `beta` 0 leaves the state
      as it is.
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  log_decay: jax.Array
  beta: jax.Array


class Kernels(NamedTuple):
  """The weights of the convolutions, as in `convolve`.

  Attributes:
    q: [K,H,W].
    k: [K,H,W].
    v: [K,G,U,W].
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array


def unit(x: jax.Array) -> jax.Array:
  """Return x [...,H] divided by its length, in f32. The order of the sum is fixed."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(sum_entries(x * x)[..., None] + UNIT_EPS)


def init_state(inputs: DeltaInputs) -> jax.Array:
  """Return states of zeros, f32[B,K,G,H,U]."""
  batch, _, heads, values, size = inputs.v.shape
  return jnp.zeros((batch, heads, values, inputs.k.shape[-1], size), jnp.float32)


def recur(
  inputs: DeltaInputs, state: jax.Array | None = None, starts: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """Compute the gated delta rule token by token.

  Args:
    inputs: of T tokens.
    state: f32[B,K,G,H,U], the state before the first token; None means zeros.
    starts: bool[B,T], where the state is set to zero before a token; None means nowhere.

  Returns:
    The outputs f32[B,T,K,G,U], and the state after the last token.
  """
  before = init_state(inputs) if state is None else state
  q, k, v = _prepare(inputs)
  decay = jnp.exp(inputs.log_decay)
  if starts is not None:
    decay = jnp.where(starts[..., None, None], 0.0, decay)

  def step(state, token):
    q, k, v, decay, beta = token
    state = state * decay[..., None, None]
    # Sums over H in a fixed order, so that a row does not depend on the others.
    found = sum_entries(jnp.moveaxis(state * k[:, :, None, :, None], -2, -1))
    delta = (v - found) * beta[..., None]
    state = state + k[:, :, None, :, None] * delta[..., None, :]
    return state, sum_entries(jnp.moveaxis(state * q[:, :, None, :, None], -2, -1))

  tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, decay, inputs.beta))
  after, out = jax.lax.scan(step, before, tokens)
  return jnp.moveaxis(out, 0, 1), after


def recur_in_chunks(
  inputs: DeltaInputs, state: jax.Array | None = None, starts: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """Compute the gated delta rule in chunks; the same as `recur`, up to rounding.

  Within a chunk, the corrections D of its tokens solve (I + L) D = β (v - decayed k S), where L is
  the strictly lower triangle of β k kᵀ with the decay between two tokens (Yang et al. 2024, section
  3.3). Chunks follow each other through the state S.

  Args:
    inputs, state, starts: as in `recur`.

  Returns:
    As `recur`.
  """
  before = init_state(inputs) if state is None else state
  length = inputs.q.shape[1]
  chunk = min(CHUNK, 1 << (length - 1).bit_length())

  def split(x):
    """Return [B,T,...] as [T/C,B,...,C,...], with the axes of heads before C; padding is 0."""
    x = jnp.pad(x, [(0, 0), (0, -length % chunk)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

  q, k, v = map(split, _prepare(inputs))
  log_decay, beta = split(inputs.log_decay), split(inputs.beta)
  runs = jnp.zeros(q.shape[:3], jnp.int32)
  if starts is not None:
    runs = jnp.cumsum(split(starts), axis=2, dtype=jnp.int32)  # 0 follows the chunk before
  causal = jnp.tril(jnp.ones((chunk, chunk), bool))
  strict = jnp.tril(causal, -1)

  def step(state, tokens):
    q, k, v, log_decay, beta, runs = tokens
    same = (runs[:, :, None] == runs[:, None, :]) & causal
    # Differences between sums from the start would lose the small ones after strong decays.
    between = jnp.where(strict[:, :, None, None], log_decay[:, :, None], 0)
    between = jnp.cumsum(between, axis=1)  # [B,C,C,K,G]
    between = jnp.exp(jnp.where(same[..., None, None], between, -jnp.inf))
    carried = jnp.cumsum(log_decay, axis=1)
    carried = jnp.exp(jnp.where((runs == 0)[..., None, None], carried, -jnp.inf))
    lower = einsum_f32('BIKH,BJKH->BIJK', k, k)[..., None] * between * beta[:, :, None]
    lower = jnp.where(strict[:, :, None, None], lower, 0)
    found = einsum_f32('BCKH,BKGHU->BCKGU', k, state) * carried[..., None]
    inverse = _invert(jnp.moveaxis(lower, (1, 2), (-2, -1)))
    delta = einsum_f32('BKGIJ,BJKGU->BIKGU', inverse, (v - found) * beta[..., None])
    scores = einsum_f32('BIKH,BJKH->BIJK', q, k)[..., None] * between
    out = einsum_f32('BCKH,BKGHU->BCKGU', q, state) * carried[..., None]
    out = out + einsum_f32('BIJKG,BJKGU->BIKGU', scores, delta)
    added = einsum_f32('BCKH,BCKGU->BKGHU', k, delta * between[:, -1][..., None])
    return state * carried[:, -1][..., None, None] + added, out

  after, out = jax.lax.scan(step, before, (q, k, v, log_decay, beta, runs))
  out = jnp.moveaxis(out, 0, 1)
  return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :length], after


def _prepare(inputs: DeltaInputs) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Return unit queries times H^-1/2, unit keys and values, in f32."""
  q = unit(inputs.q) * inputs.q.shape[-1] ** -0.5
  return q, unit(inputs.k), inputs.v.astype(jnp.float32)


def _invert(lower: jax.Array) -> jax.Array:
  """Return the inverse of I + lower, for strictly lower triangular matrices f32[...,C,C].

  The inverses of two blocks on the diagonal give that of the block that holds both: the part below
  is -B⁻¹ L A⁻¹. Starting at blocks of one element, this takes log₂ C products of matrices; it is
  as accurate as substitution, and splits over devices like any product.
  """
  size = lower.shape[-1]
  inverse = jnp.ones((*lower.shape[:-2], size, 1, 1), jnp.float32)  # [...,blocks,S,S]
  side = 1
  while side < size:
    pairs = inverse.reshape(*inverse.shape[:-3], -1, 2, side, side)
    first, second = pairs[..., 0, :, :], pairs[..., 1, :, :]
    number = size // (2 * side)
    blocks = lower.reshape(*lower.shape[:-2], number, 2 * side, number, 2 * side)
    blocks = jnp.diagonal(blocks, axis1=-4, axis2=-2)  # [...,2S,2S,number]
    below = jnp.moveaxis(blocks, -1, -3)[..., side:, :side]
    below = -einsum_f32(
      '...IJ,...JK->...IK', einsum_f32('...IJ,...JK->...IK', second, below), first
    )
    top = jnp.concatenate([first, jnp.zeros_like(first)], -1)
    inverse = jnp.concatenate([top, jnp.concatenate([below, second], -1)], -2)
    side *= 2
  return inverse[..., 0, :, :]


def convolve(
  x: jax.Array,
  kernel: jax.Array,
  before: jax.Array | None = None,
  starts: jax.Array | None = None,
) -> jax.Array:
  """Return the causal convolution of each channel over its last W tokens.

  Args:
    x: [B,T,...,H].
    kernel: [...,H,W]; the last weight is that of the token itself.
    before: [B,W-1,...,H], the inputs before the first token; None means zeros.
    starts: bool[B,T], the first tokens of texts, over which no convolution looks back; None means
      none.

  Returns:
    f32[B,T,...,H].
  """
  length, width = x.shape[1], kernel.shape[-1]
  if before is None:
    before = jnp.zeros((x.shape[0], width - 1, *x.shape[2:]), x.dtype)
  inputs = jnp.concatenate([before, x], axis=1).astype(jnp.float32)
  weights = kernel.astype(jnp.float32)
  runs = None
  if starts is not None:
    runs = jnp.pad(jnp.cumsum(starts, axis=1), [(0, 0), (width - 1, 0)])
  out = jnp.zeros(x.shape, jnp.float32)
  for i in range(width):
    term = inputs[:, i : i + length] * weights[..., i]
    if runs is not None:
      same = runs[:, i : i + length] == runs[:, width - 1 :]
      term = jnp.where(same.reshape(*same.shape, *(1,) * (x.ndim - 2)), term, 0)
    out = out + term
  return out


def starts_of(segment_ids: jax.Array) -> jax.Array:
  """Return bool[B,T], the first token of each segment of packed or padded rows.

  Args:
    segment_ids: i32[B,T]; the tokens of a segment, and of padding, follow each other.
  """
  before = jnp.pad(segment_ids, [(0, 0), (1, 0)], constant_values=-1)[:, :-1]
  return segment_ids != before


def run_texts(inputs: DeltaInputs, kernels: Kernels, starts: jax.Array | None = None) -> jax.Array:
  """Return the output f32[B,T,K,G,U] of whole texts: convolutions, SiLU and the gated delta rule.

  Args:
    inputs: of all tokens, before the convolutions.
    kernels: the weights of the convolutions.
    starts: bool[B,T], the first token of each text of packed rows; None means the first of a row.
  """
  q, k, v = (
    jax.nn.silu(convolve(x, kernel, None, starts))
    for x, kernel in zip(inputs[:3], kernels, strict=True)
  )
  return recur_in_chunks(inputs._replace(q=q, k=k, v=v), None, starts)[0]
