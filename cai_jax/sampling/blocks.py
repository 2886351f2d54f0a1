"""Rows of a vocabulary, viewed as blocks of entries.

Axes: B rows, V vocabulary, N blocks, S entries of a block.
"""

import math

import jax
import jax.numpy as jnp

BLOCK = 128  # vocabulary entries of a block
PIECES = 16  # a large vocabulary is cut into this many pieces, so that a mesh can split it
LARGE = 2**14  # vocabulary size from which it is cut into pieces
TILE_ROWS = 8  # rows of a tile, in which TPUs store arrays


def to_blocks(logits: jax.Array) -> jax.Array:
  """Cut logits [B,V] into pieces and these into blocks [B,N,S]; fill each piece's last with -inf.

  Without pieces, the blocks would straddle devices: a vocabulary of 1,002 blocks split over four
  devices made GSPMD compute the logits of half of it on each device.
  """
  count = piece_count(logits.shape[1])
  if count > 1 and logits.shape[1] // count % TILE_ROWS:
    # XLA would cut the output table instead, and a TPU copies it for that in each step.
    logits = jax.lax.optimization_barrier(logits)
  pieces = logits.reshape(len(logits), count, -1)
  padding = -pieces.shape[2] % BLOCK
  if padding:
    pieces = jnp.pad(pieces, ((0, 0), (0, 0), (0, padding)), constant_values=-jnp.inf)
  return pieces.reshape(len(logits), -1, BLOCK)


def piece_count(vocab_size: int) -> int:
  """Return the number of pieces that a vocabulary is cut into."""
  return math.gcd(vocab_size, PIECES) if vocab_size >= LARGE else 1


def token_at(block: jax.Array, entry: jax.Array, vocab_size: int) -> jax.Array:
  """Return the tokens i32[B] at these entries i32[B] of blocks i32[B]."""
  piece_size = vocab_size // piece_count(vocab_size)
  blocks = -(-piece_size // BLOCK)
  return (block // blocks * piece_size + block % blocks * BLOCK + entry).astype(jnp.int32)


def take_block(blocks: jax.Array, block: jax.Array) -> jax.Array:
  """Return the block [B,S] of each row of blocks [B,N,S] that block i32[B] names."""
  return jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0]


def expand(per_row: jax.Array, like: jax.Array) -> jax.Array:
  """Append axes of length 1 to per_row [B], up to the rank of `like`."""
  return per_row.reshape(-1, *[1] * (like.ndim - 1))


def sum_blocks(sums: jax.Array) -> jax.Array:
  """Sum block sums f32[B,N] to f32[B]; on CPUs, in an order that depends on N alone."""
  return jax.lax.platform_dependent(
    sums, cpu=lambda x: jnp.cumsum(x, -1)[:, -1], default=lambda x: x.sum(-1)
  )


def scale(logits: jax.Array, top: jax.Array, temperature: jax.Array) -> jax.Array:
  """Return (logits - top) / temperature, which is 0 for the most likely token.

  Args:
    logits: f32[B,...].
    top: f32[B], each row's largest logit.
    temperature: f32[B], positive.
  """
  return (logits - expand(top, logits)) / expand(temperature, logits)


def weigh(logits: jax.Array, top: jax.Array, temperature: jax.Array) -> jax.Array:
  """Return the exponential of `scale`, which is 1 for the most likely token."""
  return jnp.exp(scale(logits, top, temperature))
