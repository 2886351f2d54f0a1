"""Rotary positions (Su et al. 2021) and the scalings that extend them to longer contexts.

The frequencies do not depend on the length of a sequence: rotated keys stay in the cache while a
sequence grows. `DynamicRope` and `LongRope` say what this means for them.

The types have the names of `rope_type` in a Hugging Face config, and the formulas of transformers'
`modeling_rope_utils`. `cai_jax.model.families.rope` reads and writes them.
"""

import dataclasses
import math
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp

from cai_jax.runtime.errors import UserError


class RopeScaling(Protocol):
  """A scaling of rotary frequencies."""

  @property
  def amplitude(self) -> float:
    """The factor of all cosines and sines."""

  @property
  def remark(self) -> str | None:
    """How the scaling limits the context, if it does."""

  def scale(self, frequency: jax.Array, theta: float) -> jax.Array:
    """Return the scaled frequencies.

    Args:
      frequency: f32[C/2], theta^(-2i/C) for the C rotated channels.
      theta: their base.
    """


@dataclasses.dataclass(frozen=True)
class LinearRope:
  """Position interpolation (Chen et al. 2023), `linear`.

  Attributes:
    factor: divisor of all frequencies.
  """

  factor: float
  amplitude: ClassVar[float] = 1.0
  remark: ClassVar[None] = None

  def __post_init__(self):
    _check_factor(self.factor)

  def scale(self, frequency: jax.Array, theta: float) -> jax.Array:
    """See `RopeScaling`."""
    return frequency / self.factor


@dataclasses.dataclass(frozen=True)
class DynamicRope:
  """Dynamic NTK scaling (bloc97 and emozilla 2023), `dynamic`.

  The base grows with the length of a sequence beyond `max_position_embeddings`. Shorter sequences
  have the unscaled frequencies. Longer ones are refused here, so nothing is scaled.

  Attributes:
    factor: how fast the base grows; kept for writing config.json.
  """

  factor: float
  amplitude: ClassVar[float] = 1.0
  remark: ClassVar[str] = (
    'dynamic scaling of rotary frequencies begins beyond max_position_embeddings. Longer contexts '
    'are refused, so it changes nothing.'
  )

  def __post_init__(self):
    _check_factor(self.factor)

  def scale(self, frequency: jax.Array, theta: float) -> jax.Array:
    """See `RopeScaling`."""
    return frequency


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
  """The frequency scaling of Llama 3.1 and later, `llama3`.

  Attributes:
    factor: divisor of low frequencies.
    low_freq_factor: a frequency is low if it makes fewer turns than this within the original
      context.
    high_freq_factor: a frequency is unchanged if it makes more turns than this within the original
      context.
    original_max_positions: the original context, in tokens.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_positions: int
  amplitude: ClassVar[float] = 1.0
  remark: ClassVar[None] = None

  def __post_init__(self):
    if self.low_freq_factor >= self.high_freq_factor or self.factor < 1:
      raise UserError(
        f'factor={self.factor}, low_freq_factor={self.low_freq_factor} and high_freq_factor='
        f'{self.high_freq_factor} do not fit. The factor must be at least 1, and low_freq_factor '
        'less than high_freq_factor.'
      )

  def scale(self, frequency: jax.Array, theta: float) -> jax.Array:
    """See `RopeScaling`."""
    # Waves longer than the original context are divided by `factor`, short waves are kept, and
    # those between are interpolated.
    turns = self.original_max_positions * frequency / (2 * jnp.pi)
    keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
    keep = jnp.clip(keep, 0.0, 1.0)
    return frequency * (keep + (1.0 - keep) / self.factor)


@dataclasses.dataclass(frozen=True)
class YarnRope:
  """YaRN (Peng et al. 2023, section 3), `yarn`.

  Attributes:
    factor: divisor of low frequencies.
    original_max_positions: the original context, in tokens.
    beta_fast: a frequency is unchanged if it makes more turns than this within the original
      context.
    beta_slow: a frequency is low if it makes fewer turns than this within the original context.
    attention_factor: factor of cosines and sines; None means that `amplitude` derives it.
    mscale: weight of log(factor) in the numerator of the amplitude (DeepSeek-V2).
    mscale_all_dim: weight of log(factor) in its denominator.
    truncate: whether the bounds of the interpolated channels are rounded outwards to integers.
  """

  factor: float
  original_max_positions: int
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float | None = None
  mscale: float | None = None
  mscale_all_dim: float | None = None
  truncate: bool = True
  remark: ClassVar[None] = None

  def __post_init__(self):
    _check_factor(self.factor)
    if self.beta_fast < self.beta_slow:
      raise UserError(
        f'beta_fast={self.beta_fast} is less than beta_slow={self.beta_slow}. It must be at least '
        'as large.'
      )

  @property
  def amplitude(self) -> float:
    """The factor of all cosines and sines; by default 0.1 · ln(factor) + 1 (section 3.4)."""
    if self.attention_factor is not None:
      return self.attention_factor
    log = math.log(self.factor)
    if self.mscale is None or self.mscale_all_dim is None:
      return 0.1 * log + 1.0
    return (0.1 * self.mscale * log + 1.0) / (0.1 * self.mscale_all_dim * log + 1.0)

  def scale(self, frequency: jax.Array, theta: float) -> jax.Array:
    """See `RopeScaling`."""
    half = len(frequency)

    def index_with(turns: float) -> float:
      """Return the index, not an integer, of the frequency with this many turns."""
      return half * math.log(self.original_max_positions / (turns * 2 * math.pi)) / math.log(theta)

    first, last = index_with(self.beta_fast), index_with(self.beta_slow)
    if self.truncate:
      first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    width = last - first or 0.001
    low = jnp.clip((jnp.arange(half, dtype=jnp.float32) - first) / width, 0.0, 1.0)
    return frequency * (1.0 - low + low / self.factor)


@dataclasses.dataclass(frozen=True)
class LongRope:
  """LongRoPE (Ding et al. 2024), `longrope`: a divisor for each frequency.

  Transformers takes the short divisors for sequences within the original context, and the long ones
  for longer sequences. Here the choice holds for all lengths. With the short divisors, the context
  is the original one.

  Attributes:
    short_factors: divisors of the frequencies within the original context.
    long_factors: divisors of the frequencies in the whole context.
    original_max_positions: the original context, in tokens.
    max_positions: the whole context, in tokens.
    factor: ratio of the two contexts for the amplitude; None means their quotient.
    attention_factor: factor of cosines and sines; None means that `amplitude` derives it.
    long: whether the long divisors and the whole context are used. config.json cannot say this.
  """

  short_factors: tuple[float, ...]
  long_factors: tuple[float, ...]
  original_max_positions: int
  max_positions: int
  factor: float | None = None
  attention_factor: float | None = None
  long: bool = False

  def __post_init__(self):
    if self.factor is not None:
      _check_factor(self.factor)
    if self.original_max_positions < 2:
      raise UserError('original_max_position_embeddings is 1. It must be at least 2.')

  @property
  def context(self) -> int:
    """The longest context for the chosen divisors, in tokens."""
    return self.max_positions if self.long else min(self.original_max_positions, self.max_positions)

  @property
  def amplitude(self) -> float:
    """The factor of all cosines and sines, for either choice (section 3.2)."""
    if self.attention_factor is not None:
      return self.attention_factor
    factor = self.max_positions / self.original_max_positions
    factor = factor if self.factor is None else self.factor
    return math.sqrt(1 + math.log(max(factor, 1)) / math.log(self.original_max_positions))

  @property
  def remark(self) -> str | None:
    """See `RopeScaling`."""
    if self.context == self.max_positions:
      return None
    return (
      f'the context is {self.context} of {self.max_positions} tokens, for which the short factors '
      'of longrope hold. Set model.long_context to use the long factors and the whole context.'
    )

  def scale(self, frequency: jax.Array, theta: float) -> jax.Array:
    """See `RopeScaling`."""
    divisors = self.long_factors if self.long else self.short_factors
    return frequency / jnp.array(divisors, jnp.float32)


@dataclasses.dataclass(frozen=True)
class ProportionalRope:
  """The rotation of Gemma 4's global layers, `proportional`: low frequencies become zero.

  It is not the rotation of leading channels: the pairs of channels and the frequencies are those of
  the whole head.

  Attributes:
    fraction: fraction of the frequencies that are kept, from the highest on.
    factor: divisor of all frequencies.
  """

  fraction: float = 1.0
  factor: float = 1.0
  amplitude: ClassVar[float] = 1.0
  remark: ClassVar[None] = None

  def __post_init__(self):
    _check_factor(self.factor)
    if not 0 <= self.fraction <= 1:
      raise UserError(f'partial_rotary_factor is {self.fraction}. It must be between 0 and 1.')

  def scale(self, frequency: jax.Array, theta: float) -> jax.Array:
    """See `RopeScaling`."""
    kept = int(self.fraction * 2 * len(frequency) // 2)
    return jnp.where(jnp.arange(len(frequency)) < kept, frequency, 0.0) / self.factor


def lengthen(scaling: RopeScaling | None) -> RopeScaling | None:
  """Return a scaling with the whole context if it is a `LongRope`; any other as it is.

  Args:
    scaling: the scaling.
  """
  return dataclasses.replace(scaling, long=True) if isinstance(scaling, LongRope) else scaling


@dataclasses.dataclass(frozen=True)
class QueryGrowth:
  """Queries that grow with their position (Ministral 3): 1 + rate · ln(1 + ⌊position / period⌋).

  Scores of many keys are then as far apart as those of few (Nakanishi 2025, section 3).

  Attributes:
    rate: of the growth.
    period: tokens with the same factor. The first ones have the factor 1.

  Raises:
    UserError: if one of them is not positive.
  """

  rate: float
  period: int

  def __post_init__(self):
    if not (self.rate > 0 and self.period > 0):
      raise UserError(f'rate={self.rate} and period={self.period} must be positive.')

  def factors(self, positions: jax.Array) -> jax.Array:
    """Return the factors f32[B,T] of rotated queries.

    Args:
      positions: i32[B,T]; negative ones have the factor 1.
    """
    periods = jnp.maximum(positions, 0) // self.period
    return 1.0 + self.rate * jnp.log1p(periods.astype(jnp.float32))


def _check_factor(factor: float) -> None:
  if factor < 1:
    raise UserError(f'factor is {factor}. It must be at least 1.')


@dataclasses.dataclass(frozen=True)
class Rope:
  """The rotary positions of a layer.

  Attributes:
    theta: base of the frequencies.
    scaling: scaling of the frequencies, or None.
    channels: number of leading channels of a head that are rotated; None means all of them.
  """

  theta: float = 10_000.0
  scaling: RopeScaling | None = None
  channels: int | None = None
