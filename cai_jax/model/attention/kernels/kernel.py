"""The interface of attention kernels, their registry, and a check that a kernel can run.

A kernel computes causal attention within the segments of packed rows, as training needs it. All
kernels give the same result up to rounding; they differ in speed, memory and the devices that they
run on. To add one, register a `Kernel` in a file of this folder, or in a file of your own that
`config.plugins` names.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import jax
from jax.sharding import AbstractMesh, Mesh

from cai_jax.model.attention.mask import SharedTokens
from cai_jax.model.attention.scores import PLAIN, Scores
from cai_jax.model.attention.sequence import attend_by_heads, splits_rows
from cai_jax.model.config import ModelConfig
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.registry import Registry


class Attend(Protocol):
  """The computation of a kernel."""

  def __call__(
    self,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    window: int | None,
    mesh: Mesh | AbstractMesh | None,
    scores: Scores,
  ) -> jax.Array:
    """Return the output [B,T,N,H] of causal attention within segments.

    Args:
      q: [B,T,N,H], rotated.
      k: [B,T,K,H], rotated.
      v: [B,T,K,H].
      segment_ids: i32[B,T].
      window: number of tokens that a query sees, itself included; None means no limit.
      mesh: splits rows over its batch axes, and heads over `tensor` and `sequence`.
      scores: scale and cap of the scores.

    A kernel for models with sinks also takes the keyword `sinks`: f32[N], a score of each head
    beside those of the keys. It has no value, so it only makes the others' weights smaller.

    A kernel for rows whose segments share tokens also takes the keyword `shared`, a `SharedTokens`.
    """


def accept_any(dtype: str, length: int) -> None:
  """Accept every compute dtype and row length."""


def accept_any_head(head_dim: int, device: jax.Device) -> None:
  """Accept every head size."""


@dataclasses.dataclass(frozen=True)
class Kernel:
  """An attention kernel.

  Attributes:
    attend: the computation.
    platform: the only JAX platform that it runs on, such as 'tpu'; None means all. A kernel for one
      platform needs a mesh.
    check: called with the compute dtype and the number of tokens per row; raises UserError if the
      kernel does not support them.
    check_head: called with the size of a head and a device; raises UserError if the kernel does not
      support such heads on it.
    takes_mask: whether `attend` also takes the keyword `mask`: bool[B,T,T], which key each query
      sees. The model computes it once for all layers with the same window.
    deterministic: whether XLA can compile the gradient so that it has the same bits in every run.
    caps: whether `attend` can cap the scores.
    sinks: whether `attend` takes the keyword `sinks`.
    shares: whether `attend` takes the keyword `shared`.
    longest_row: most tokens per row in a new training, because the kernel's memory grows with the
      square of the length; None means no limit. A training that began with longer rows continues.
  """

  attend: Attend
  platform: str | None = None
  check: Callable[[str, int], None] = accept_any
  check_head: Callable[[int, jax.Device], None] = accept_any_head
  takes_mask: bool = False
  deterministic: bool = True
  caps: bool = True
  sinks: bool = False
  shares: bool = False
  longest_row: int | None = None


KERNELS: Registry[Kernel] = Registry('attention kernel')


AUTO = 'auto'
# What 'auto' stands for: the first that can run. The last one runs on every device.
BY_SPEED = ('splash', 'cudnn', 'blocks')


def choose_kernel(
  mesh: Mesh,
  dtype: str,
  lengths: Sequence[int],
  head_dims: Sequence[int],
  cap: float | None = None,
  sinks: bool = False,
  shares: bool = False,
) -> str:
  """Return the name of the fastest kernel that can run in a new training.

  Args:
    mesh: the devices to run on.
    dtype: compute dtype, such as 'bfloat16'.
    lengths: numbers of tokens per row of all batches.
    head_dims: sizes of the heads of all layers.
    cap: cap of the attention scores, or None.
    sinks: whether the model has sinks.
    shares: whether segments share tokens.
  """
  *preferred, fallback = BY_SPEED
  for name in preferred:
    try:
      check_new_rows(name, max(lengths))
      for length, head_dim in itertools.product(lengths, dict.fromkeys(head_dims)):
        check_kernel(name, mesh, dtype, length, head_dim, cap, sinks, shares)
    except UserError:
      continue
    return name
  return fallback


def check_new_rows(name: str, length: int) -> None:
  """Check that a training that has not begun may use a kernel for its rows.

  Args:
    name: a name in `KERNELS`.
    length: number of tokens per row.

  Raises:
    UserError: if rows are longer than the kernel's `longest_row`.
  """
  longest = KERNELS[name].longest_row
  if longest is not None and length > longest:
    raise UserError(
      f'attention {name!r} needs a mask of all pairs of tokens, so it takes rows of at most '
      f"{longest:,} tokens, not {length:,}. Choose 'blocks', whose memory grows linearly with the "
      'length.'
    )


def check_kernel(
  name: str,
  mesh: Mesh,
  dtype: str,
  length: int,
  head_dim: int | None = None,
  cap: float | None = None,
  sinks: bool = False,
  shares: bool = False,
) -> None:
  """Check that a kernel can run.

  Args:
    name: a name in `KERNELS`.
    mesh: the devices to run on.
    dtype: compute dtype, such as 'bfloat16'.
    length: number of tokens per row.
    head_dim: size of a head; None leaves it unchecked.
    cap: cap of the attention scores, or None.
    sinks: whether the model has sinks.
    shares: whether segments share tokens.

  Raises:
    UserError: if there is no such kernel, or if it does not support the devices, the dtype, the row
      length, the heads, the cap, the sinks or shared tokens.
  """
  kernel = KERNELS[name]
  device = mesh.devices.flat[0]
  platform = device.platform
  here = {n: other for n, other in KERNELS.items() if other.platform in (None, platform)}
  if kernel.platform is not None and kernel.platform != platform:
    raise UserError(
      f'attention {name!r} runs on {kernel.platform.upper()}s only, and these devices are '
      f'{platform.upper()}s. Choose {_list_names(here)}.'
    )
  kernel.check(dtype, length)
  if head_dim is not None:
    kernel.check_head(head_dim, device)
  if cap is not None and not kernel.caps:
    raise UserError(
      f'attention {name!r} cannot cap attention scores, and the model has attention_cap={cap}. '
      f'Choose {_list_names(n for n, x in here.items() if x.caps)}.'
    )
  if sinks and not kernel.sinks:
    raise UserError(
      f'attention {name!r} has no sinks, which the attention of the model needs. '
      f'Choose {_list_names(n for n, x in here.items() if x.sinks)}.'
    )
  if shares and not kernel.shares:
    raise UserError(
      f'attention {name!r} cannot share the tokens of a prompt. Choose '
      f'{_list_names(n for n, x in here.items() if x.shares)}, or set share_prompts=False.'
    )


def check_model(
  name: str, mesh: Mesh, dtype: str, length: int, model: ModelConfig, shares: bool = False
) -> None:
  """Check that a kernel can run, with all heads, the cap and the sinks of a model.

  Args:
    name, mesh, dtype, length, shares: as for `check_kernel`.
    model: the shape of the model.

  Raises:
    UserError: as `check_kernel`.
  """
  for head_dim in dict.fromkeys(kind.head_dim for kind in model.kinds):
    check_kernel(name, mesh, dtype, length, head_dim, model.attention_cap, model.sinks, shares)


def _list_names(names: Iterable[str]) -> str:
  return ' or '.join(map(repr, sorted(names)))


def bind_kernel(
  name: str,
  segment_ids: jax.Array | None,
  mesh: Mesh | AbstractMesh | None,
  scores: Scores = PLAIN,
  shared: SharedTokens | None = None,
) -> Callable[..., jax.Array]:
  """Return a kernel's `attend` with the segments, the mesh and the scores bound.

  Args:
    name: a name in `KERNELS`.
    segment_ids: i32[B,T].
    mesh: the mesh that the rows are split over.
    scores: scale and cap of the scores.
    shared: which tokens several segments see; None means none.

  Returns:
    A function of q, k, v and window.

  Raises:
    ValueError: without segments, without a mesh for a kernel that needs one, or with shared tokens
      for a kernel that does not take them.
  """
  kernel = KERNELS[name]
  if segment_ids is None:
    raise ValueError(f'attention {name!r} is for packed rows: it needs segment_ids.')
  if mesh is None and kernel.platform is not None:
    raise ValueError(f'attention {name!r} needs a mesh.')
  if shared is not None and not kernel.shares:
    raise ValueError(f'attention {name!r} cannot share tokens.')
  rows: dict[str, Any] = {'segment_ids': segment_ids}
  if shared is not None:
    rows['shared'] = shared
  attend = functools.partial(kernel.attend, mesh=mesh, scores=scores)
  if mesh is not None and splits_rows(mesh):
    return attend_by_heads(attend, rows, mesh)
  return functools.partial(attend, **rows)
