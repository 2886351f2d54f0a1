"""Splash attention: JAX's Pallas kernels for TPUs."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel,
  splash_attention_mask,
)
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from cai_jax.model.attention.kernels.kernel import KERNELS, Kernel
from cai_jax.model.attention.scores import PLAIN, Scores
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import BATCH, HEADS

TILE = 128  # row lengths and block sizes are multiples of this many tokens
MAX_BLOCK = 512  # tokens


def attend_splash(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segment_ids: jax.Array,
  window: int | None,
  mesh: Mesh | AbstractMesh | None,
  scores: Scores = PLAIN,
  sinks: jax.Array | None = None,
  interpret: bool = False,
) -> jax.Array:
  """Attend within segments with splash attention; see `kernel.Attend`.

  The kernel skips blocks that the causal mask or the window hides from a whole tile of queries, and
  masks segments inside the other blocks.

  Args:
    q, k, v, segment_ids, window, mesh: as for `kernel.Attend`.
    sinks: as for `kernel.Attend`.
    interpret: run the kernel in Pallas's interpreter, which works on any device.
    scores: scale and cap of the scores.
  """
  length = q.shape[1]
  block = max(size for size in range(TILE, MAX_BLOCK + 1, TILE) if length % size == 0)
  sizes = splash_attention_kernel.BlockSizes(
    block_q=block,
    block_kv=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_q_dq=block,
    block_kv_dq=block,
  )
  mask: splash_attention_mask.Mask = splash_attention_mask.CausalMask((length, length))
  if window is not None:
    mask = splash_attention_mask.LocalMask((length, length), (window - 1, 0), 0)

  def attend_on_device(q, k, v, segment_ids, sinks):
    masks = splash_attention_mask.MultiHeadMask([mask] * q.shape[2])
    kernel = splash_attention_kernel.make_splash_mha(
      masks,
      block_sizes=sizes,
      head_shards=1,
      q_seq_shards=1,
      interpret=interpret,
      attn_logits_soft_cap=scores.cap,
    )

    def attend_row(q, k, v, ids):
      return kernel(q, k, v, segment_ids=splash_attention_kernel.SegmentIds(ids, ids), sinks=sinks)

    scaled = (q.astype(jnp.float32) * scores.factor(q.shape[-1])).astype(q.dtype)
    heads_first = (x.swapaxes(1, 2) for x in (scaled, k, v))
    return jax.vmap(attend_row)(*heads_first, segment_ids).swapaxes(1, 2)

  by_row_and_head = P(*BATCH, None, HEADS, None)
  return jax.shard_map(
    attend_on_device,
    mesh=mesh,
    in_specs=(by_row_and_head, by_row_and_head, by_row_and_head, BATCH, P(HEADS)),
    out_specs=by_row_and_head,
    check_vma=False,
  )(q, k, v, segment_ids, sinks)


def check_length(dtype: str, length: int) -> None:
  """Check that the kernel supports the row length.

  Args:
    dtype: not used.
    length: number of tokens per row.

  Raises:
    UserError: if `length` is not a multiple of `TILE` tokens.
  """
  if length % TILE:
    raise UserError(
      f"attention 'splash' needs rows of a multiple of {TILE} tokens, not {length}. Change the row "
      'length, or choose another kernel.'
    )


KERNELS.register('splash')(Kernel(attend_splash, 'tpu', check_length, sinks=True))
