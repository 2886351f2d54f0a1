"""Quantized models: which parameters of a model a format replaces, and what they take.

These are the kernels of all linear layers. Embeddings, the output layer, norms, biases and the
parts of a gated delta rule that are no linear layers stay as they are.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from cai_jax.model.config import ModelConfig
from cai_jax.model.parts import Linear
from cai_jax.model.quantized.kernel import FORMATS, FULL, check_format
from cai_jax.model.sharding import param_shardings, path_str
from cai_jax.model.transformer import Params, Transformer, abstract_model
from cai_jax.runtime.errors import UserError


def check_weights(config: ModelConfig, weights: str, field: str) -> None:
  """Check that a model can be held in a format.

  Args:
    config: the shape of the model.
    weights: name of the format, or 'full'.
    field: the setting that names the format, for the message.

  Raises:
    UserError: if there is no such format, the model has experts, or a kernel does not suit it.
  """
  check_format(weights, field)
  if weights == FULL:
    return
  if config.experts is not None:
    raise UserError(
      f'{field}={weights!r}: the matrices of experts, which are most of this model, cannot be '
      f'quantized. Set {field}={FULL!r}.'
    )
  try:
    abstract_params(config, 'float32', weights)
  except UserError as error:
    raise UserError(f'{field}={weights!r}: {error}') from None


@functools.lru_cache
def quantizable(config: ModelConfig) -> dict[str, int]:
  """Return the number of output axes of each kernel that formats replace, by its path.

  Args:
    config: the shape of the model.
  """
  model = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0)))
  modules = {'/'.join(map(str, path)): module for path, module in nnx.iter_modules(model)}
  return {
    f'{path}/kernel': len(module.outs)
    for path, module in modules.items()
    if isinstance(module, Linear)
  }


def quantize_params(params: Params, config: ModelConfig, weights: str) -> Params:
  """Return parameters with quantized kernels in place of those of linear layers.

  Args:
    params: the parameters of a plain model.
    config: the shape of the model.
    weights: name of the format, or 'full', which changes nothing.
  """
  if weights == FULL:
    return params
  outs, kind = quantizable(config), FORMATS[weights]

  def quantize(path, x):
    name = path_str(path)
    return kind.quantize(x.astype(jnp.float32), outs[name]) if name in outs else x

  return jax.tree_util.tree_map_with_path(quantize, params)


@functools.lru_cache
def abstract_params(config: ModelConfig, dtype: str, weights: str = FULL) -> Params:
  """Return the parameters of a model as ShapeDtypeStructs.

  Args:
    config: the shape of the model.
    dtype: dtype of what is not quantized.
    weights: name of the format, or 'full'.
  """
  params = abstract_model(config, param_dtype=dtype)[1]
  return jax.eval_shape(lambda p: quantize_params(p, config, weights), params)


def param_bytes(config: ModelConfig, dtype: str, weights: str = FULL) -> int:
  """Return the bytes of all parameters of a model; the arguments are those of `abstract_params`."""
  leaves = jax.tree.leaves(abstract_params(config, dtype, weights))
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


def kernel_quantizer(
  config: ModelConfig, weights: str, mesh: Mesh
) -> Callable[[str, jax.Array], Any]:
  """Return a function of a path and the array f32 there, which quantizes it on the mesh.

  What the format does not replace is returned as it is. Loading calls it with one weight after the
  other, so no copy of the whole model in f32 is ever in memory.

  Args:
    config: the shape of the model.
    weights: name of the format, or 'full'.
    mesh: where the parameters are.
  """
  if weights == FULL:
    return lambda path, x: x
  outs, kind = quantizable(config), FORMATS[weights]

  @functools.cache
  def program(shardings, number):
    return jax.jit(lambda x: kind.quantize(x, number), out_shardings=shardings)

  def quantize(path: str, x: jax.Array) -> Any:
    if path not in outs:
      return x
    abstract = jax.eval_shape(lambda x: kind.quantize(x, outs[path]), x)
    shardings = param_shardings({path: abstract}, mesh)[path]
    return program(shardings, outs[path])(x)

  return quantize
