"""cuDNN's flash attention for NVIDIA GPUs, called through `jax.nn`."""

from typing import Literal

import jax
from jax.sharding import AbstractMesh, Mesh

from cai_jax.model.attention.kernels.kernel import KERNELS, Kernel
from cai_jax.runtime.errors import UserError


def attend_cudnn(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segment_ids: jax.Array,
  window: int | None,
  mesh: Mesh | AbstractMesh | None = None,
  implementation: Literal['xla', 'cudnn'] = 'cudnn',
) -> jax.Array:
  """Attend within segments with cuDNN; see `kernel.Attend`.

  The call to cuDNN has no argument for segment ids, so they become a mask bool[B,1,T,T].

  Args:
    q, k, v, segment_ids, window: as for `kernel.Attend`.
    mesh: not used; XLA splits rows and heads as q, k and v are split.
    implementation: 'xla' makes the same call on devices without cuDNN.
  """
  del mesh
  same_segment = segment_ids[:, :, None] == segment_ids[:, None, :]
  return jax.nn.dot_product_attention(
    q,
    k,
    v,
    mask=same_segment[:, None],
    is_causal=True,
    local_window_size=None if window is None else (window - 1, 0),
    implementation=implementation,
  )


def check_compute_dtype(dtype: str, length: int) -> None:
  """Check that cuDNN supports the compute dtype.

  Args:
    dtype: compute dtype, such as 'bfloat16'.
    length: not used.

  Raises:
    UserError: if it is float32.
  """
  if dtype == 'float32':
    raise UserError(
      "attention 'cudnn' supports bfloat16 and float16, but not float32. Set "
      "train.dtype='bfloat16', or choose another kernel."
    )


# With jax 0.11.2, XLA fails to compile cuDNN's attention with xla_gpu_deterministic_ops.
KERNELS.register('cudnn')(Kernel(attend_cudnn, 'gpu', check_compute_dtype, deterministic=False))
