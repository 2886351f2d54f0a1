"""Settings of the engine, and the sizes of the compiled programs that follow from them."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from cai_jax.model.attention.cached import CACHED, choose_cached
from cai_jax.model.config import ModelConfig
from cai_jax.model.lm import LM
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import batch_shards
from cai_jax.runtime.settings import setting
from cai_jax.runtime.values import convert_fields
from cai_jax.sampling.caches import cache_bytes, cache_dtype, on_cpu
from cai_jax.sampling.draft_choice import MOST_DRAFTS
from cai_jax.sampling.step_arrays import runs_in_parts

MOST_ROW_SIZES = 4  # numbers of rows of a step on one CPU device, whose programs compile fast
# The same for prefilled tokens, below the largest number.
CHUNK_SIZES = 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096
MIN_ROWS, MIN_HALF_ROWS = 64, 32  # rows of a step on CPUs, in f32 and in half precision
REWIND = 64  # tokens; how far the cache of a windowed layer can be rewound
LENGTH_MULTIPLE = 64  # tokens; cache lengths are multiples of this
AUTO = 'auto'  # `cai_jax.sampling.auto` then derives the size from the device and the models
SIZES = ('slots', 'cache_gib', 'prefill_tokens', 'prefill_width', 'page_tokens', 'longest_burst')


def round_up_length(tokens: int) -> int:
  """Round a cache length up to a multiple of `LENGTH_MULTIPLE`, so that few sizes are compiled."""
  return -(-tokens // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def _size(doc: str, added: bool = False, most: float | None = None) -> Any:
  """Return a field for a number of an engine's sizes, which is 'auto' by default."""
  return setting(AUTO, doc, added, most, word=AUTO)


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """Sizes of the compiled sampling programs.

  They affect speed and memory, and change results only by rounding. `'auto'` stands for what suits
  the device and the models. It is replaced by a number when a run first samples, and a run that
  continues uses the numbers of its `config.json` again.

  Raises:
    UserError: if a value is neither 'auto' nor in range.
  """

  slots: int = _size('Maximum number of chains in flight.', most=100_000)
  cache_gib: float = _size(
    'Memory for key-value caches on each device, in GiB. If it is too small for all slots, the '
    'engine uses fewer.',
  )
  prefill_tokens: int = _size(
    'Number of tokens of a prefill chunk, over all slots.', most=1_000_000
  )
  prefill_width: int = _size(
    'Number of tokens of one slot that attention processes together during prefill.'
  )
  page_tokens: int = _size(
    'Number of tokens of a page of the cache. A slot gets pages as its context grows.',
    added=True,
  )
  longest_burst: int = _size('Maximum number of decode steps before the host looks for stop texts.')
  attention: str = setting(
    'auto',
    "How steps attend to the cache: `'pages'`, XLA's products, on every device; `'ragged'`, JAX's "
    "ragged paged attention, a kernel for TPUs; `'triton'`, a kernel for NVIDIA GPUs. `'auto'` "
    "means the kernel for the device if it can run the model, and otherwise `'pages'`.",
    added=True,
  )
  draft_tokens: int = setting(
    0,
    'Number of tokens that each slot drafts in a decode step from its own text, to be verified in '
    "the same step. Drafts change no text. `'auto'` drafts where few slots are active and measured "
    'speed gains; it never drafts where that would change bits, nor for models with layers that '
    'keep a state (Qwen3.5).',
    added=True,
    most=64,
    word=AUTO,
  )
  spare_tokens: int = setting(
    0,
    'Extra cache tokens per slot, for replies that become longer when another model with another '
    'tokenizer reads them.',
  )

  def __post_init__(self):
    convert_fields(self, 'engine')
    for name in SIZES:
      value = getattr(self, name)
      if value != AUTO and not 0 < value < math.inf:
        raise UserError(f"engine: {name}={value} must be 'auto' or a positive number.")
    if self.attention != AUTO:
      CACHED[self.attention]  # raises a UserError if there is no such entry
    for name in ('draft_tokens', 'spare_tokens'):
      value = getattr(self, name)
      if value != AUTO and value < 0:
        raise UserError(f'engine: {name}={value} must be at least 0.')

  @property
  def unresolved(self) -> tuple[str, ...]:
    """The names of the fields that are 'auto'. The methods below need numbers."""
    return tuple(name for name in (*SIZES, 'attention') if getattr(self, name) == AUTO)

  @property
  def rewind(self) -> int:
    """Number of tokens by which windowed layers can go back; to go further, a slot starts over."""
    return REWIND

  @property
  def most_drafts(self) -> int:
    """The largest number of tokens that a slot drafts in a step."""
    return MOST_DRAFTS if self.draft_tokens == AUTO else self.draft_tokens

  @property
  def undo(self) -> int:
    """Number of tokens that windowed layers keep beyond their window, to undo recent writes."""
    return self.longest_burst + self.most_drafts + self.rewind

  @property
  def slack(self) -> int:
    """Number of tokens beyond its window for which a windowed layer has room."""
    # prefill_tokens is rounded as in `chunk_sizes`.
    chunk = max(-(-self.prefill_tokens // 16) * 16, MIN_ROWS)
    return self.undo + max(self.longest_burst + self.most_drafts, chunk)

  def check_drafts(self, config: ModelConfig) -> None:
    """Check that a model can take back drafted tokens.

    Args:
      config: the shape of the model.

    Raises:
      UserError: if `draft_tokens` asks for drafts, and layers of the model keep a state.
    """
    if self.draft_tokens not in (0, AUTO) and config.delta is not None:
      raise UserError(
        f'engine.draft_tokens is {self.draft_tokens}, but {config.family} models have layers that '
        'keep a state, from which a wrong draft cannot be taken back. Set it to 0.'
      )

  def choose_attention(self, lm: LM) -> str:
    """Return the name of the attention to the cache of a model.

    Raises:
      UserError: if there is none of that name, or it supports neither the model nor the devices.
    """
    return choose_cached(self.attention, lm.config, lm.dtype, self.page_tokens, lm.mesh)

  def mixes(self, slots: int, lm: LM) -> bool:
    """Return whether a step with decoded rows may also prefill.

    On CPUs this saves reading the parameters twice, and from `MIN_ROWS` rows up a row's bits do not
    depend on the number of rows. With fewer rows, and on accelerators, they do, so prefill has a
    program of its own there.

    Args:
      slots: number of slots of a batch shard.
      lm: the model.
    """
    return on_cpu(lm.mesh) and slots >= min_rows(lm)

  def row_sizes(self, slots: int, lm: LM) -> tuple[int, ...]:
    """Return the numbers of rows for which a step is compiled, in ascending order.

    Where the bits depend on the number of rows, there is one size; on accelerators, the time of a
    step hardly depends on it.

    Args:
      slots: number of slots of a batch shard.
      lm: the model.
    """
    if not self.mixes(slots, lm):
      # In half precision, CPUs take six times as long to multiply a single row as two rows.
      return (max(slots, 2 if on_cpu(lm.mesh) else 1),)
    if runs_in_parts(lm.mesh):
      step = -(-slots // MOST_ROW_SIZES // 16) * 16
      return (*range(step, slots, step), slots)
    sizes, least = {slots}, min_rows(lm)
    while slots > least:
      slots = max(-(-slots // 2), least)
      sizes.add(slots)
    return tuple(sorted(sizes))

  def chunk_sizes(self, slots: int, mesh: Mesh) -> tuple[int, ...]:
    """Return the numbers of tokens of a prefill chunk, for each batch shard, in ascending order.

    On CPUs there are several sizes, because few slots often have little to prefill. All sizes are
    multiples of 16.

    Args:
      slots: number of slots.
      mesh: the model's mesh.
    """
    shards = batch_shards(mesh)
    largest = -(-self.prefill_tokens // shards // 16) * 16 if self.prefill_tokens > shards else 16
    if not on_cpu(mesh):
      return (largest,)
    largest = max(largest, MIN_ROWS)
    if runs_in_parts(mesh):
      return (*(size for size in CHUNK_SIZES if size < largest), largest)
    step = max(MIN_ROWS, -(-largest // 4 // 16) * 16)
    return (*range(step, largest, step), largest)

  def piece_width(self, slots: int, mesh: Mesh) -> int:
    """Return C, the number of tokens of one slot that attention processes together in prefill.

    Args:
      slots: number of slots.
      mesh: the model's mesh.
    """
    smallest = self.chunk_sizes(slots, mesh)[0]
    return min(self.prefill_width, max(smallest, MIN_ROWS) if on_cpu(mesh) else smallest)

  def fit(
    self, models: Sequence[LM], length: int, prefix_tokens: Sequence[int]
  ) -> tuple[int, float]:
    """Return the number of slots, and the share of their largest caches that `cache_gib` holds.

    Slots get pages as their contexts grow, so the caches of all slots need not fit at their largest
    size. There are as many slots as fit at half of it, at most `slots`.

    Args:
      models: the models in memory.
      length: number of tokens of a slot's cache.
      prefix_tokens: for each model, number of tokens of its shared prefixes, including padding.

    Raises:
      UserError: if not even one slot per batch shard fits.
    """
    budget, slot_bytes, shards = self.cache_gib * 2**30, 0.0, 1
    for lm, tokens in zip(models, prefix_tokens, strict=True):
      slot_bytes += cache_bytes(lm, length, self.slack, self.page_tokens) / lm.mesh.size
      token_bytes = sum(kind.cached for kind in lm.config.kinds) * cache_dtype(lm).itemsize
      budget -= tokens * token_bytes / lm.mesh.shape['tensor']
      shards = max(shards, batch_shards(lm.mesh))
    slots = self.slots
    if slots * slot_bytes > 2 * budget:
      max_slots = int(2 * max(budget, 0) / slot_bytes)
      # Steps of eight limit the number of distinct sizes, and so the number of programs.
      step = 8 * shards if max_slots >= 8 * shards else shards
      slots = max_slots // step * step
    if not slots or shards * slot_bytes > budget:
      needed = (shards * slot_bytes + self.cache_gib * 2**30 - budget) / 2**30
      raise UserError(
        f'engine.cache_gib={self.cache_gib} is too small: {shards} slots of {length} tokens and '
        f'the shared prefixes need {needed:.3g} GiB on each device. Increase it, or shorten '
        'prompts, max_tokens, rounds or demonstrations.'
      )
    return slots, min(1.0, budget / (slots * slot_bytes))


def min_rows(lm: LM) -> int:
  """Return the number of rows from which XLA's programs for CPUs give a row the same bits.

  Checked for products of 32 to 2,048 channels; norms and softmax sum in a fixed order.
  """
  return MIN_ROWS if lm.dtype == 'float32' else MIN_HALF_ROWS
