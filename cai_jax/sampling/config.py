"""Settings of the engine, and the sizes of the compiled programs that follow from them."""

import dataclasses
import math
from collections.abc import Sequence

from jax.sharding import Mesh

from cai_jax.model.lm import LM
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import batch_shards
from cai_jax.runtime.settings import setting
from cai_jax.runtime.values import convert_fields
from cai_jax.sampling.caches import cache_bytes

REWIND = 64  # tokens; how far the cache of a windowed layer can be rewound
LENGTH_MULTIPLE = 64  # tokens; cache lengths are multiples of this


def round_up_length(tokens: int) -> int:
  """Round a cache length up to a multiple of `LENGTH_MULTIPLE`, so that few sizes are compiled."""
  return -(-tokens // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """Sizes of the compiled sampling programs.

  They affect speed and memory, and change results only by rounding.

  Raises:
    UserError: if a value is out of range.
  """

  slots: int = setting(64, 'Maximum number of chains in flight.', most=100_000)
  cache_gib: float = setting(
    8.0,
    'Memory for key-value caches on each device, in GiB. If it is too small for all slots, the '
    'engine uses fewer.',
  )
  prefill_tokens: int = setting(
    128, 'Number of tokens of a prefill chunk, over all slots.', most=1_000_000
  )
  prefill_width: int = setting(
    16, 'Number of tokens of one slot that attention processes together during prefill.'
  )
  spans: int = setting(
    4,
    'Number of spans that a cache is split into. A decode step skips spans that no slot has '
    'reached. On GPUs, each such decision may need a round trip to the host.',
  )
  longest_burst: int = setting(
    32, 'Maximum number of decode steps before the host looks for stop texts.'
  )
  spare_tokens: int = setting(
    0,
    'Extra cache tokens per slot, for replies that become longer when another model with another '
    'tokenizer reads them.',
  )

  def __post_init__(self):
    convert_fields(self, 'engine')
    positive = ('prefill_tokens', 'prefill_width', 'spans', 'longest_burst')
    for name in ('slots', 'cache_gib', *positive):
      value = getattr(self, name)
      if not 0 < value < math.inf or (name != 'cache_gib' and value < 1):
        raise UserError(f'engine: {name}={value} must be positive.')
    if self.spare_tokens < 0:
      raise UserError(f'engine: spare_tokens={self.spare_tokens} must be at least 0.')

  @property
  def rewind(self) -> int:
    """Number of tokens by which windowed layers can go back; to go further, a slot starts over."""
    return REWIND

  @property
  def slack(self) -> int:
    """Number of tokens that windowed layers keep beyond their window, to undo recent writes."""
    # prefill_tokens is rounded as in `chunk`.
    return -(-self.prefill_tokens // 8) * 8 + self.longest_burst + self.rewind

  def chunk(self, slots: int, mesh: Mesh) -> tuple[int, int]:
    """Return the shape of a prefill chunk.

    A few slots rarely have much to prefill, so they get smaller chunks.

    Args:
      slots: number of slots.
      mesh: the model's mesh.

    Returns:
      T, the number of tokens of each batch shard, and C, the number of tokens of one slot that
      attention processes together. T is a multiple of eight, because CPUs process the remainder in
      a slower loop.
    """
    shards = batch_shards(mesh)
    size = min(self.prefill_tokens, 2 * self.prefill_width * slots) // shards
    size = -(-max(size, 1) // 8) * 8
    return size, min(size, self.prefill_width)

  def fit(self, models: Sequence[LM], length: int, prefix_tokens: Sequence[int]) -> int:
    """Return the number of slots that fit into `cache_gib`, at most `slots`.

    Args:
      models: the models in memory.
      length: number of tokens of a slot's cache.
      prefix_tokens: for each model, number of tokens of its shared prefixes, including padding.

    Raises:
      UserError: if not even one slot per batch shard fits.
    """
    budget, slot_bytes, shards = self.cache_gib * 2**30, 0.0, 1
    for lm, tokens in zip(models, prefix_tokens, strict=True):
      slot_bytes += cache_bytes(lm, length, self.slack) / lm.mesh.size
      budget -= tokens * cache_bytes(lm, 1, 0) / lm.mesh.shape['tensor']
      shards = max(shards, batch_shards(lm.mesh))
    slots = self.slots
    if slots * slot_bytes > budget:
      max_slots = int(max(budget, 0) / slot_bytes)
      # Steps of eight limit the number of distinct sizes, and so the number of programs.
      step = 8 * shards if max_slots >= 8 * shards else shards
      slots = max_slots // step * step
    if not slots:
      needed = (shards * slot_bytes + self.cache_gib * 2**30 - budget) / 2**30
      raise UserError(
        f'engine.cache_gib={self.cache_gib} is too small: {shards} slots of {length} tokens and '
        f'the shared prefixes need {needed:.3g} GiB on each device. Increase it, or shorten '
        'prompts, max_tokens, rounds or demonstrations.'
      )
    return slots
