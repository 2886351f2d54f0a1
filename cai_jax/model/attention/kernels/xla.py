"""Plain attention that XLA compiles; it holds the scores of all pairs of tokens in memory."""

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from cai_jax.model.attention.cached import KeyBlock, attend
from cai_jax.model.attention.kernels.kernel import KERNELS, Kernel
from cai_jax.model.attention.mask import causal_mask
from cai_jax.model.cache import LayerCache


def attend_plain(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segment_ids: jax.Array,
  window: int | None,
  mesh: Mesh | AbstractMesh | None = None,
) -> jax.Array:
  """Attend within segments with one mask bool[B,T,T]; see `kernel.Attend`."""
  del mesh  # XLA splits rows and heads as those of q, k and v
  positions = jnp.broadcast_to(jnp.arange(q.shape[1]), segment_ids.shape)
  same_segment = segment_ids[:, :, None] == segment_ids[:, None, :]
  mask = causal_mask(positions, positions, window, same_segment)
  return attend(q, [KeyBlock(LayerCache.from_tokens(k, v), mask)])


KERNELS.register('xla')(Kernel(attend_plain))
