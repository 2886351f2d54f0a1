"""cuDNN's flash attention for NVIDIA GPUs, called through `jax.nn`."""

from typing import Literal

import jax
from jax.sharding import AbstractMesh, Mesh

from cai_jax.model.attention.kernels.kernel import KERNELS, Kernel
from cai_jax.model.attention.mask import SharedTokens, segments_mask
from cai_jax.model.attention.scores import PLAIN, Scores
from cai_jax.runtime.errors import UserError

LONGEST_ROW = 8192  # tokens; the mask of such a row takes 64 MiB


def attend_cudnn(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segment_ids: jax.Array,
  window: int | None,
  mesh: Mesh | AbstractMesh | None = None,
  scores: Scores = PLAIN,
  implementation: Literal['xla', 'cudnn'] = 'cudnn',
  shared: SharedTokens | None = None,
) -> jax.Array:
  """Attend within segments with cuDNN; see `kernel.Attend`.

  cuDNN itself can read packed rows, by the offsets of their segments, but no public function of JAX
  passes them on (`q_offsets` of jax 0.10.2 is private). So segment ids become a mask bool[B,1,T,T],
  which `LONGEST_ROW` bounds in new trainings.

  Args:
    q, k, v, segment_ids, window: as for `kernel.Attend`.
    mesh: not used; XLA splits rows and heads as q, k and v are split.
    implementation: 'xla' makes the same call on devices without cuDNN.
    scores: scale of the scores, without a cap.
    shared: as for `kernel.Attend`.

  Raises:
    ValueError: if scores have a cap; `kernel.check_kernel` refuses it before.
  """
  del mesh
  if scores.cap is not None:
    raise ValueError("attention 'cudnn' cannot cap scores.")
  visible = segments_mask(segment_ids, segment_ids, None if shared is None else shared.last)
  if shared is not None and window is not None:  # cuDNN's window counts tokens of the row
    visible &= shared.positions[:, :, None] - shared.positions[:, None, :] < window
    window = None
  return jax.nn.dot_product_attention(
    q,
    k,
    v,
    mask=visible[:, None],
    scale=scores.scale,
    is_causal=True,
    local_window_size=None if window is None else (window - 1, 0),
    implementation=implementation,
  )


def check_dtype(dtype: str, length: int) -> None:
  """Check that cuDNN supports the compute dtype.

  Args:
    dtype: compute dtype, such as 'bfloat16'.
    length: number of tokens per row, which `LONGEST_ROW` limits only in new trainings.

  Raises:
    UserError: if the dtype is float32.
  """
  del length
  if dtype == 'float32':
    raise UserError(
      "attention 'cudnn' supports bfloat16 and float16, but not float32. Set "
      "train.dtype='bfloat16', or choose another kernel."
    )


def check_head(head_dim: int, device: jax.Device) -> None:
  """Check that cuDNN supports the heads on a device, by the rules of `jax.nn`.

  Args:
    head_dim: size of a head.
    device: a GPU.

  Raises:
    UserError: if it does not.
  """
  if not device.device_kind.startswith('NVIDIA'):
    raise UserError(
      f"attention 'cudnn' runs on NVIDIA GPUs only, and this is {device.device_kind}. Choose "
      "'blocks' or 'xla'."
    )
  capability = float(device.compute_capability)
  largest = 256 if capability >= 9 else 128  # 9.0 is Hopper
  if capability < 8 or head_dim > largest or head_dim % 8:
    raise UserError(
      f"attention 'cudnn' on {device.device_kind} needs heads of a multiple of 8 up to {largest}, "
      f'and a compute capability of at least 8.0. The heads have size {head_dim}, and the '
      f"capability is {capability}. Choose 'blocks' or 'xla'."
    )


# With jax 0.11.2, XLA fails to compile cuDNN's attention with xla_gpu_deterministic_ops.
KERNELS.register('cudnn')(
  Kernel(
    attend_cudnn,
    'gpu',
    check_dtype,
    check_head,
    deterministic=False,
    caps=False,
    longest_row=LONGEST_ROW,
    shares=True,
  )
)
