"""The interface of attention to the paged cache, its registry, and the choice for a device.

An implementation owns the arrays in which pages are stored, writes a step's keys and values to
them, and computes attention. All give the same result up to rounding. To add one, register a
`CacheAttention` in a file of this folder.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cai_jax.model.attention.scores import Scores
from cai_jax.model.cache import LayerCache, Prefixes, Step
from cai_jax.model.config import ModelConfig
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import BATCH, batch_shards
from cai_jax.runtime.registry import Registry


class Init(Protocol):
  """Allocation of pages of one layer."""

  def __call__(self, heads: int, head_dim: int, pages: int, size: int, dtype: Any) -> Any:
    """Return a NamedTuple of arrays of zeros, whose first axis counts the pages.

    Args:
      heads: number of key and value heads.
      head_dim: channels per head.
      pages: number of pages.
      size: number of tokens of a page.
      dtype: dtype of the keys and values.
    """


class MakeView(Protocol):
  """The indices and masks that layers with the same window share."""

  def __call__(
    self,
    positions: jax.Array,
    step: Step,
    index: int,
    prefixes: Prefixes,
    sizes: Sequence[int],
    page: int,
    window: int | None,
  ) -> Any:
    """Return a pytree of arrays for `Attend`.

    Args:
      positions: i32[G,X]; a negative position marks padding.
      step: where the tokens are in the cache.
      index: index of the window's tables in `step`.
      prefixes: the prefixes, and the choice of one for each token.
      sizes: number of pages of each block in one batch shard.
      page: S, number of tokens of a page.
      window: number of tokens that a query sees, itself included; None means no limit.
    """


class Attend(Protocol):
  """Writing a step's keys and values, and attention."""

  def __call__(
    self,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    blocks: tuple[Any, ...],
    prefixes: Sequence[LayerCache],
    view: Any,
    window: int | None,
    width: int,
    mesh: Mesh,
    scores: Scores,
    sinks: jax.Array | None = None,
  ) -> tuple[jax.Array, tuple[Any, ...]]:
    """Return the output [G,X,N,H] in the dtype of `q`, and the updated blocks.

    Args:
      q: [G,X,N,H], rotated.
      k: [G,X,K,H], rotated.
      v: [G,X,K,H].
      blocks: the layer's blocks of pages. Batch shards are their leading axis.
      prefixes: the layer's keys and values of each shared prefix, as the implementation 'pages'
        stores them.
      view: what `MakeView` returned for the layer's window.
      window: the layer's window.
      width: C, number of tokens of a piece of prefill.
      mesh: the mesh over which rows and heads are split.
      scores: scale and cap of the scores.
      sinks: f32[N], a score of each head beside those of the keys, without a value; or None.
    """


def accept_any(config: ModelConfig, dtype: str, page_tokens: int, mesh: Mesh) -> str | None:
  """Return None: every model is supported."""
  return None


@dataclasses.dataclass(frozen=True)
class CacheAttention:
  """An implementation of attention to the paged cache.

  Attributes:
    init: allocates pages.
    make_view: computes what layers share.
    attend: writes and attends.
    heads: the axis of the arrays that counts heads, which the mesh axis `tensor` splits.
    page_axis: the axis of the first array that counts the tokens of a page.
    layouts: for each array, its axes from the slowest to the fastest in a TPU's memory; None means
      the order of the shape.
    max_blocks: the largest number of separate arrays that a pool of pages is split into; None
      leaves it to the engine.
    takes_pages: whether it supports pages of so many tokens.
    platform: the only platform that it runs on; None means all. Anywhere else it runs in an
      interpreter, which is for tests.
    refuse: returns why a model, a compute dtype, a page size or a mesh is not supported, or None.
  """

  init: Init
  make_view: MakeView
  attend: Attend
  heads: int
  page_axis: int
  layouts: tuple[tuple[int, ...] | None, ...]
  max_blocks: int | None = None
  takes_pages: Callable[[int], bool] = lambda tokens: True
  platform: str | None = None
  refuse: Callable[[ModelConfig, str, int, Mesh], str | None] = accept_any


def attend_by_shard(
  local: Callable[..., Any], heads: int, mesh: Mesh, *args: Any
) -> tuple[jax.Array, tuple[Any, ...]]:
  """Return what `local` computes for the rows and heads of each device, which do not communicate.

  Args:
    local: takes `args` of one batch shard, whose axis G has the length 1.
    heads: as in `CacheAttention`.
    mesh: the mesh over which rows and heads are split.
    *args: q, k, v, blocks, prefixes, view and sinks of `Attend`.
  """
  if mesh.size == 1:
    return local(*args)
  # The prefill of a shared prefix has a single group, which every batch shard computes as a whole.
  batch = tuple(BATCH) if len(args[0]) == batch_shards(mesh) else (None,)
  tokens, pages = P(*batch, None, 'tensor'), P(*batch, *[None] * (heads - 1), 'tensor')
  specs = tokens, tokens, tokens, pages, P(None, 'tensor'), P(*batch), P('tensor')
  outputs = tokens, pages
  return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=outputs, check_vma=False)(*args)


CACHED: Registry[CacheAttention] = Registry('attention to the cache')
AUTO = 'auto'


def choose_cached(name: str, config: ModelConfig, dtype: str, page_tokens: int, mesh: Mesh) -> str:
  """Return the name of the implementation to use on a mesh.

  Args:
    name: a name in `CACHED`, or 'auto': the kernel for the platform where it can run, else 'pages'.
    config: the shape of the model.
    dtype: compute dtype.
    page_tokens: number of tokens of a page.
    mesh: the devices to run on.

  Raises:
    UserError: if there is no such implementation, or it does not support the model or the devices.
  """
  platform = mesh.devices.flat[0].platform
  if name == AUTO:
    kernels = (name for name in CACHED if CACHED[name].platform == platform)
    args = config, dtype, page_tokens, mesh
    return next((name for name in kernels if not CACHED[name].refuse(*args)), 'pages')
  entry = CACHED[name]
  if entry.platform not in (None, platform):
    raise UserError(
      f'engine.attention={name!r} runs on {entry.platform.upper()}s only, and these devices are '
      f"{platform.upper()}s. Set it to 'pages', which runs on every device."
    )
  if reason := entry.refuse(config, dtype, page_tokens, mesh):
    raise UserError(f"engine.attention={name!r} {reason} Set it to 'pages'.")
  return name
