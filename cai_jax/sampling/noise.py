"""Gumbel noise: a pure function of a turn's random key, a token's index, a level and an index.

Of scores s_i + g_i, where the g_i are independent Gumbel noise, the largest is s_i's with
probability exp(s_i) / Σ_j exp(s_j) (Gumbel 1954; Maddison et al. 2014, "A* sampling"). A draw
therefore changes only if a change of the scores exceeds the distance between the two largest sums.

The random generator is fixed here, so that no JAX setting changes the result.
"""

import jax
import jax.numpy as jnp

# Name of the sampler, which is part of a turn's key in the journal. Change it with any change of
# `cai_jax/sampling/sample.py` or this module that draws other tokens from the same logits.
SAMPLER = 'gumbel-1'
ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)  # of Threefry-2x32


def token_keys(keys: jax.Array, index: jax.Array) -> jax.Array:
  """Return the random key of one token per row.

  Args:
    keys: u32[B,2], random keys of the turns.
    index: i32[B], number of tokens sampled before this one.

  Returns:
    u32[B,2].
  """
  return jnp.stack(_threefry(keys, jnp.zeros_like(index), index), -1)


def gumbel(keys: jax.Array, level: int, count: int) -> jax.Array:
  """Return standard Gumbel noise, a pure function of the row's key, the level and the index.

  Args:
    keys: u32[B,2], random keys.
    level: number that separates independent draws with the same keys.
    count: number of values of each row.

  Returns:
    f32[B,count]. Row b holds the first `count` values of an endless sequence.
  """
  index = jax.lax.broadcasted_iota(jnp.uint32, (len(keys), count), 1)
  return gumbel_from_bits(*_threefry(keys[:, None], jnp.full_like(index, level), index))


def gumbel_from_bits(high: jax.Array, low: jax.Array) -> jax.Array:
  """Return Gumbel noise -log(-log(u)) with u = (2^32 high + low + 1/2) / 2^64.

  The half of u that lies nearer to 0 or 1 is rounded to f32, so both tails keep the relative
  precision of f32: the probability that the noise exceeds g is 1 - exp(-exp(-g)) with a relative
  error of 5e-6 and an absolute one of 2^-64. With u of 23 bits, the noise would never exceed 16.7.

  Args:
    high, low: u32[...], random bits.
  """
  upper = high > jnp.uint32(2**31 - 1)
  high, low = jnp.where(upper, ~high, high), jnp.where(upper, ~low, low)
  distance = (high.astype(jnp.float32) * 2.0**32 + (low.astype(jnp.float32) + 0.5)) * 2.0**-64
  # The noise is large where the exponential variate is small, so u counts from 1 downwards.
  return -jnp.log(jnp.where(upper, -jnp.log(distance), -jnp.log1p(-distance)))


def _threefry(keys: jax.Array, first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Encrypt two words with Threefry-2x32 of 20 rounds (Salmon et al. 2011), elementwise.

  Written out, it is fused with what reads it; on CPUs, JAX's own is a loop that takes five times as
  long.

  Args:
    keys: u32[...,2].
    first, second: integers; their shapes and that of keys[..., 0] broadcast.

  Returns:
    Two arrays u32[...].
  """
  key = [keys[..., 0], keys[..., 1], keys[..., 0] ^ keys[..., 1] ^ jnp.uint32(0x1BD11BDA)]
  a, b = first.astype(jnp.uint32) + key[0], second.astype(jnp.uint32) + key[1]
  for group in range(5):
    for bits in ROTATIONS[group % 2]:
      a = a + b
      b = a ^ ((b << bits) | (b >> (32 - bits)))
    a = a + key[(group + 1) % 3]
    b = b + key[(group + 2) % 3] + jnp.uint32(group + 1)
  return a, b
