"""Kernels in 4-bit NormalFloat with doubly quantized scales (Dettmers et al. 2023, "QLoRA").

Each block of 64 weights of an output channel is divided by its largest absolute value, and each
quotient is rounded to the nearest of 16 numbers, which have equal shares of a normal distribution
(section 3, "4-bit NormalFloat Quantization"; the numbers are in appendix E). The blocks' scales are
8-bit integers again ("Double Quantization"). Two details differ from the paper: the scales of one
output channel share a second scale, where the paper has one for each 256 scales, and these integers
are unsigned, where the paper subtracts a mean. A weight takes 4 + 8/64 + 32/I bits.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from cai_jax.model.quantized.kernel import FORMATS, num_outputs
from cai_jax.runtime.errors import UserError

BLOCK = 64
LARGEST = 255
NUMBERS = (
  *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
  *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
  *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
  *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@FORMATS.register('nf4')
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nf4Kernel:
  """A kernel `NUMBERS[codes] · scales · step`. Blocks are along the last input axis.

  Attributes:
    codes: u8[…,J/2,*outs], two codes in a byte along the last input axis J, the first one in the
      lower four bits.
    scales: u8[…,J/block,*outs], the scales of the blocks, in units of `step`.
    step: f32[1,…,*outs], for each output channel.
    outs: number of output axes.
  """

  codes: jax.Array
  scales: jax.Array
  step: jax.Array
  outs: int = dataclasses.field(metadata={'static': True})

  @classmethod
  def quantize(cls, kernel: jax.Array, outs: int) -> 'Nf4Kernel':
    """Return a kernel in 4-bit NormalFloat; see `QuantizedKernel.quantize`.

    If 64 does not divide the last input axis, blocks have the largest power of two that does.

    Raises:
      UserError: if the size of the last input axis is odd.
    """
    axis = kernel.ndim - outs - 1
    size, block = kernel.shape[axis], math.gcd(kernel.shape[axis], BLOCK)
    if block < 2:
      raise UserError(
        f'A kernel of shape {kernel.shape} has {size} inputs along axis {axis}. nf4 stores two in '
        "a byte, so their number must be even. Choose 'int8'."
      )
    lead, channels = kernel.shape[:axis], kernel.shape[axis + 1 :]
    blocks = kernel.reshape(*lead, size // block, block, *channels)
    largest = jnp.max(jnp.abs(blocks), axis + 1)
    step = jnp.max(largest, tuple(range(axis + 1)), keepdims=True) / LARGEST
    scales = jnp.round(largest / _nonzero(step))
    codes = _nearest(blocks / _nonzero(jnp.expand_dims(scales * step, axis + 1)))
    pairs = codes.reshape(*lead, size // 2, 2, *channels)
    first, second = (jax.lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in range(2))
    return cls(first | second << 4, scales.astype(jnp.uint8), step, outs)

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the kernel."""
    axis = self.codes.ndim - self.outs - 1
    shape = self.codes.shape
    return (*shape[:axis], 2 * shape[axis], *shape[axis + 1 :])

  def factors(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Return NUMBERS[codes] · scales as a matrix [I,O] in `dtype`, and the steps f32[O]."""
    axis, channels = self.codes.ndim - self.outs - 1, num_outputs(self.codes.shape, self.outs)
    pairs = jnp.stack([self.codes & 15, self.codes >> 4], axis + 1)
    blocks = (*self.scales.shape[: axis + 1], -1, *self.scales.shape[axis + 1 :])
    numbers = _look_up(pairs.reshape(self.shape)).reshape(blocks)
    matrix = numbers * jnp.expand_dims(self.scales, axis + 1).astype(jnp.float32)
    return matrix.astype(dtype).reshape(-1, channels), self.step.reshape(-1)


def _look_up(codes: jax.Array) -> jax.Array:
  """Return NUMBERS[codes] as f32.

  Selections by each of the four bits take the place of a gather, because they become a part of the
  loop around them and use vector instructions.

  Args:
    codes: u8, from 0 to 15.
  """
  values = [jnp.float32(number) for number in NUMBERS]
  for bit in range(4):
    is_set = (codes >> bit) & 1 == 1
    values = [
      jnp.where(is_set, second, first)
      for first, second in zip(values[::2], values[1::2], strict=True)
    ]
  return values[0]


def _nearest(x: jax.Array) -> jax.Array:
  """Return the index u8 of the nearest of NUMBERS."""
  codes = jnp.zeros(x.shape, jnp.uint8)
  for first, second in zip(NUMBERS, NUMBERS[1:], strict=False):
    codes += (x > (first + second) / 2).astype(jnp.uint8)
  return codes


def _nonzero(x: jax.Array) -> jax.Array:
  """Return x with 1 in place of 0, to divide by."""
  return jnp.where(x == 0, 1, x)
