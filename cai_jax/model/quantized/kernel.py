"""Kernels in fewer bits: their interface, the registry of formats, and the product with them.

A quantized kernel takes the place of an array in the tree of parameters, as the value of a linear
layer's `kernel`. It is a pytree of small arrays, so whatever handles trees of parameters handles
it. The layers do not know which format runs: they call `multiply`.

To add a format, register a class in a file of this folder, or in a file of your own that
`config.plugins` names.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol, TypeGuard

import jax
import jax.numpy as jnp

from cai_jax.model.precision import einsum_f32, einsum_rounded
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.registry import Registry

FULL = 'full'  # the name for kernels that are plain arrays


class QuantizedKernel(Protocol):
  """A format: a pytree of arrays that together are a kernel.

  Each array has as many axes as the kernel. On a mesh it is split like the kernel, except along
  axes of size 1.
  """

  @classmethod
  def quantize(cls, kernel: jax.Array, outs: int) -> 'QuantizedKernel':
    """Return a kernel in this format.

    Args:
      kernel: f32[*ins,*outs].
      outs: number of its output axes.
    """
    ...

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the kernel."""
    ...

  def factors(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Return a matrix [I,O] in `dtype` and a scale f32[O], whose product is the kernel as [I,O].

    Args:
      dtype: dtype of the matrix.
    """
    ...


FORMATS: Registry[type[QuantizedKernel]] = Registry('format of weights')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptedKernel:
  """A quantized kernel plus scale · A · B, which is added where the kernel is used or saved.

  Merging adapters into a quantized model returns these. Kernels in full precision for the whole
  model need not fit into memory then. Such a model can be used and saved. To train it, or to place
  it on another mesh, save it and load it again.

  Attributes:
    kernel: [*ins,*outs].
    a: f32[I,r].
    b: f32[r,O].
    scale: factor of the term.
  """

  kernel: 'QuantizedKernel | AdaptedKernel'
  a: jax.Array
  b: jax.Array
  scale: float = dataclasses.field(metadata={'static': True})

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the kernel."""
    return self.kernel.shape

  def factors(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Return a matrix [I,O] in `dtype`, and ones; see `QuantizedKernel.factors`."""
    matrix, scale = self.kernel.factors(jnp.float32)
    delta = jnp.matmul(self.a, self.b, precision=jax.lax.Precision.HIGHEST)
    total = matrix * scale + self.scale * delta
    return total.astype(dtype), jnp.ones_like(scale)


def check_format(name: str, field: str) -> None:
  """Check the name of a format.

  Args:
    name: the name, or 'full'.
    field: the setting that has it, for the message.

  Raises:
    UserError: if no format has that name.
  """
  if name != FULL and name not in FORMATS:
    raise UserError(f'{field}={name!r} is not one of {(FULL, *sorted(FORMATS))}.')


def is_quantized(x: Any) -> TypeGuard['QuantizedKernel | AdaptedKernel']:
  """Return whether a node of a tree of parameters is a quantized kernel."""
  return isinstance(x, (AdaptedKernel, *FORMATS.values()))


def has_quantized(params: Any) -> bool:
  """Return whether a tree of parameters has a quantized kernel."""
  return any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized)))


def dequantize(x: Any, dtype: Any = jnp.float32) -> Any:
  """Return a parameter as an array; what is no quantized kernel is returned as it is.

  Args:
    x: a quantized kernel, or anything else.
    dtype: dtype of the array; the arithmetic is f32.
  """
  if not is_quantized(x):
    return x
  matrix, scale = x.factors(jnp.float32)
  return (matrix * scale).reshape(x.shape).astype(dtype)


def map_params(function: Callable[..., Any], params: Any, *others: Any) -> Any:
  """Return `jax.tree.map(function, params, *others)` with each quantized kernel as one leaf.

  Args:
    function: gets the leaves.
    params: a tree of parameters.
    others: trees of the same structure.
  """
  return jax.tree.map(function, params, *others, is_leaf=is_quantized)


def multiply(
  x: jax.Array, kernel: Any, outs: int, rounds: bool, split_last: bool = False
) -> jax.Array:
  """Return x · kernel, accumulated in f32. Gradients do not reach a quantized kernel.

  Args:
    x: [X,I].
    kernel: [*ins,*outs], an array or a quantized kernel.
    outs: O, number of output channels.
    rounds: whether a result in the dtype of x will do, which saves time on GPUs.
    split_last: as for `einsum_f32`.

  Returns:
    [X,O], f32 or in the dtype of x.
  """
  if is_quantized(kernel):
    return _multiply_frozen(x, kernel)
  # A kernel with two input axes would be copied at every call; as one matrix it is not.
  matrix = kernel.astype(x.dtype).reshape(-1, outs)
  return (einsum_rounded if rounds else einsum_f32)('XI,IO->XO', x, matrix, split_last)


@jax.custom_vjp
def _multiply_frozen(x: jax.Array, kernel: QuantizedKernel) -> jax.Array:
  """Return f32[X,O] for x [X,I].

  The scale multiplies the sum, not the matrix, so the matrix is exact in bf16 if it has integers of
  8 bits. The backward pass keeps the kernel as it is stored and dequantizes it again. JAX's own
  gradient would keep the matrices of all layers in the compute dtype.
  """
  matrix, scale = kernel.factors(x.dtype)
  return einsum_f32('XI,IO->XO', x, matrix) * scale


def _multiply_frozen_fwd(x, kernel):
  return _multiply_frozen(x, kernel), (x[:0], kernel)  # of x, only the dtype


def _multiply_frozen_bwd(residuals, cotangent):
  empty, kernel = residuals
  matrix, scale = kernel.factors(empty.dtype)
  cotangent = (cotangent * scale).astype(empty.dtype)
  return einsum_rounded('XO,IO->XI', cotangent, matrix), None


_multiply_frozen.defvjp(_multiply_frozen_fwd, _multiply_frozen_bwd)


def num_outputs(shape: tuple[int, ...], outs: int) -> int:
  """Return O, the number of output channels of a kernel.

  Args:
    shape: shape of the kernel.
    outs: number of its output axes, which are the last.
  """
  return math.prod(shape[len(shape) - outs :])
