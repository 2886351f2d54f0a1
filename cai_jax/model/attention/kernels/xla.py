"""Plain attention that XLA compiles; it holds the scores of all pairs of tokens in memory."""

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from cai_jax.model.attention.kernels.kernel import KERNELS, Kernel
from cai_jax.model.attention.mask import SharedTokens, causal_mask, segments_mask
from cai_jax.model.attention.scores import PLAIN, Scores
from cai_jax.model.attention.softmax import attend


def attend_plain(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segment_ids: jax.Array,
  window: int | None,
  mesh: Mesh | AbstractMesh | None = None,
  scores: Scores = PLAIN,
  mask: jax.Array | None = None,
  sinks: jax.Array | None = None,
  shared: SharedTokens | None = None,
) -> jax.Array:
  """Attend within segments with one mask bool[B,T,T]; see `kernel.Attend`."""
  del mesh  # XLA splits rows and heads as those of q, k and v
  if mask is None:
    mask = segment_mask(segment_ids, window, shared)
  return attend(q, k, v, mask, scores, sinks)


def segment_mask(
  segment_ids: jax.Array, window: int | None, shared: SharedTokens | None = None
) -> jax.Array:
  """Return the mask bool[B,T,T] of causal attention within the segments of packed rows.

  Args:
    segment_ids: i32[B,T].
    window: number of tokens that a query sees, itself included; None means no limit.
    shared: which tokens several segments see; None means none.
  """
  if shared is None:
    positions = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    return causal_mask(positions, positions, window, segments_mask(segment_ids, segment_ids))
  allowed = segments_mask(segment_ids, segment_ids, shared.last)
  return causal_mask(shared.positions, shared.positions, window, allowed)


KERNELS.register('xla')(Kernel(attend_plain, takes_mask=True, sinks=True, shares=True))
