"""Drawing one token a row from logits: temperature, top-k, top-p, and one uniform number a row."""

import jax
import jax.numpy as jnp

BLOCK = 128  # vocabulary entries summed together before the search for the drawn one


def uniforms(keys: jax.Array, index: jax.Array) -> jax.Array:
  """f32[B] in [0, 1): a pure function of each row's key u32[B,2] and of index i32[B]."""

  def one(key, i):
    return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key), i))

  return jax.vmap(one)(keys, index)


def keep_mask(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
  """bool[B,V]: the tokens that top-k i32[B] and then top-p f32[B] leave of logits f32[B,V].

  top-k (Fan et al. 2018) keeps the k largest logits, and any equal to the k-th. top-p (Holtzman et
  al. 2020) keeps, of those, the shortest prefix by falling probability whose mass reaches p, and
  any equal to its last. The most likely token always stays.
  """
  vocab = logits.shape[-1]
  ordered = -jnp.sort(-logits, axis=-1)
  k = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)
  kept = jnp.where(ordered >= jnp.take_along_axis(ordered, k[:, None] - 1, -1), ordered, -jnp.inf)
  probs = jax.nn.softmax(kept, axis=-1)
  before = jnp.cumsum(probs, axis=-1) - probs
  needed = (before < top_p[:, None]) & jnp.isfinite(kept)
  least = jnp.min(jnp.where(needed, kept, jnp.inf), axis=-1, keepdims=True)
  return logits >= least


def inverse_cdf(weights: jax.Array, u: jax.Array) -> jax.Array:
  """i32[B]: the token at which the running sum of weights f32[B,V] passes u f32[B] of the total.

  Searched in two levels, blocks and then entries of one block, so that no running sum goes over
  the whole vocabulary. A token of weight 0 is never drawn.
  """
  b, vocab = weights.shape
  weights = jnp.pad(weights, ((0, 0), (0, -vocab % BLOCK))).reshape(b, -1, BLOCK)
  sums = weights.sum(-1)
  ends = jnp.cumsum(sums, -1)
  target = (u * ends[:, -1])[:, None]

  def passed(ends, weights):
    # Rounding may leave the place on an entry of weight 0, or past the last: then the next entry
    # that has weight is taken, or the last one.
    place, there = jnp.arange(weights.shape[-1]), weights > 0
    last = jnp.max(jnp.where(there, place, 0), -1, keepdims=True)
    at = jnp.minimum(jnp.sum(ends <= target, -1, keepdims=True), last)
    return jnp.argmax(there & (place >= at), -1)[:, None]

  block = passed(ends, sums)
  inside = jnp.take_along_axis(weights, block[:, :, None], 1)[:, 0]
  start = jnp.take_along_axis(ends - sums, block, 1)
  entry = passed(start + jnp.cumsum(inside, -1), inside)
  return (block * BLOCK + entry)[:, 0].astype(jnp.int32)


def sample(
  logits: jax.Array,
  u: jax.Array,
  temperature: jax.Array,
  top_k: jax.Array,
  top_p: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Tokens i32[B] and their log-probabilities f32[B].

  Args:
    logits: f32[B,V].
    u: f32[B] in [0, 1), the only randomness.
    temperature: f32[B]; 0 takes the most likely token.
    top_k: i32[B]; 0 keeps every token.
    top_p: f32[B] in (0, 1].

  The log-probability is the model's own: log softmax(logits), before temperature and filters.
  """
  scaled = logits / jnp.where(temperature > 0, temperature, 1.0)[:, None]
  filtering = jnp.any((temperature > 0) & ((top_k > 0) | (top_p < 1)))
  keep = jax.lax.cond(
    filtering,
    lambda: keep_mask(scaled, top_k, top_p),
    lambda: jnp.ones(logits.shape, bool),
  )
  weights = jnp.where(keep, jnp.exp(scaled - scaled.max(-1, keepdims=True)), 0.0)
  drawn = inverse_cdf(weights, u)
  tokens = jnp.where(temperature > 0, drawn, jnp.argmax(logits, -1).astype(jnp.int32))
  chosen = jnp.take_along_axis(logits, tokens[:, None], -1)[:, 0]
  return tokens, chosen - jax.nn.logsumexp(logits, -1)
