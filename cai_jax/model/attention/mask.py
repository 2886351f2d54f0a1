"""Attention masks. `cai_jax.model.transformer` defines the axis letters."""

from typing import NamedTuple

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


class SharedTokens(NamedTuple):
  """Which tokens of packed rows several segments see.

  Each token is seen by its own segment and by those after it, up to the one that `last` names. So
  several responses in a row can have one copy of their prompt (Wang and Hegde 2024,
  arXiv:2410.20305).

  Attributes:
    last: i32[B,T], number of the last segment that sees a token.
    positions: i32[B,T], of each token in its sequence. Windows count in these, because tokens of
      one sequence are not next to each other.
  """

  last: jax.Array
  positions: jax.Array


def segments_mask(
  query_ids: jax.Array, key_ids: jax.Array, last: jax.Array | None = None
) -> jax.Array:
  """Return the mask bool[B,T,S] of the keys that a query's segment sees.

  Args:
    query_ids: i32[B,T], segments of the queries.
    key_ids: i32[B,S], segments of the keys.
    last: i32[B,S], last segment that sees each key; None means that only its own does.
  """
  queries, keys = query_ids[:, :, None], key_ids[:, None, :]
  if last is None:
    return queries == keys
  return (keys <= queries) & (queries <= last[:, None, :])
