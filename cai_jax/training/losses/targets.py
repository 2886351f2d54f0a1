"""The target and the loss weight of each position of a packed batch."""

import jax
import jax.numpy as jnp

from cai_jax.training.losses.loss import Batch


def next_token_targets(batch: Batch) -> tuple[jax.Array, jax.Array]:
  """Return the target token of each position, and its weight in the loss.

  Position t predicts token t+1 of the same segment, if `loss_mask` marks that token. The first
  token of a segment and padding (segment 0) are never targets.

  Args:
    batch: `tokens`, `segment_ids` and `loss_mask`, each i32[B,T].

  Returns:
    targets i32[B,T], and weights f32[B,T], 1 or 0.
  """
  segments = batch['segment_ids']
  following = following_segments(segments)
  marked = jnp.roll(batch['loss_mask'], -1, axis=1) != 0
  weights = marked & (segments == following) & (segments > 0)
  return jnp.roll(batch['tokens'], -1, axis=1), weights.astype(jnp.float32)


def following_segments(segment_ids: jax.Array) -> jax.Array:
  """Return i32[B,T], the segment of the token after each one, and 0 after the last one.

  If a mesh splits rows, `jnp.roll(..).at[:, -1].set(0)` sets the last entry of each part to 0 in
  some programs of XLA (seen with jax 0.10.2 on CPUs, in micro-batches with the kernel `blocks`).

  Args:
    segment_ids: i32[B,T].
  """
  is_last = jnp.arange(segment_ids.shape[1]) == segment_ids.shape[1] - 1
  return jnp.where(is_last, 0, jnp.roll(segment_ids, -1, axis=1))


def count_sequences(segment_ids: jax.Array, weights: jax.Array) -> jax.Array:
  """Return the number f32[] of segments that have a target.

  Args:
    segment_ids: i32[B,T], from 1 to at most T in each row; 0 is padding.
    weights: f32[B,T], 1 or 0.
  """
  rows = jnp.arange(segment_ids.shape[0])[:, None]
  has_target = jnp.zeros((segment_ids.shape[0], segment_ids.shape[1] + 1))
  return jnp.sum(has_target.at[rows, segment_ids].max(weights))
