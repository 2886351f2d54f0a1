"""Attention masks. `cai_jax.model.transformer` defines the axis letters."""

import jax

MASKED = -1e30  # score of a masked key; finite, so that a query without any key gives no NaN


def causal_mask(
  query_positions: jax.Array,
  key_positions: jax.Array,
  window: int | None,
  allowed: jax.Array | None = None,
) -> jax.Array:
  """Return the mask bool[B,T,S] of causal attention.

  Args:
    query_positions: i32[B,T].
    key_positions: i32[B,S].
    window: number of tokens that a query sees, itself included; None means no limit.
    allowed: bool[B,T,S], a further condition, such as equal segments.
  """
  distance = query_positions[:, :, None] - key_positions[:, None, :]
  mask = distance >= 0
  if window is not None:
    mask &= distance < window
  return mask if allowed is None else mask & allowed
