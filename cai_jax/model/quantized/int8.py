"""Kernels of 8-bit integers with a scale for each output channel.

The largest absolute value of a channel becomes 127: absmax quantization of each column (Dettmers et
al. 2022, "LLM.int8()", sections 2 and 3.1). Activations are not quantized.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from cai_jax.model.quantized.kernel import FORMATS

LARGEST = 127


@FORMATS.register('int8')
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Kernel:
  """A kernel `values · scale`.

  Attributes:
    values: i8[*ins,*outs], from -127 to 127.
    scale: f32[1,…,*outs], with an axis of size 1 for each input axis.
  """

  values: jax.Array
  scale: jax.Array

  @classmethod
  def quantize(cls, kernel: jax.Array, outs: int) -> 'Int8Kernel':
    """Return the nearest kernel of 8-bit integers; see `QuantizedKernel.quantize`."""
    ins = tuple(range(kernel.ndim - outs))
    scale = jnp.max(jnp.abs(kernel), ins, keepdims=True) / LARGEST
    values = jnp.round(kernel / jnp.where(scale == 0, 1, scale))
    return cls(values.astype(jnp.int8), scale)

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the kernel."""
    return self.values.shape

  def factors(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Return the integers as a matrix [I,O], which is exact, and the scale f32[O]."""
    return self.values.astype(dtype).reshape(-1, self.scale.size), self.scale.reshape(-1)
