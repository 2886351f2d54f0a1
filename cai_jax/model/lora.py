"""Low-rank adaptation (Hu et al. 2021): x·W + alpha/r · x·A·B, where only A and B are trained.

The adapter is part of `Linear`. Libraries that add adapters to an existing model, such as qwix,
find a weight by tracing the products that use it. That does not work here, because kernels have
several axes, are reshaped and cast before use, and half-precision products have custom gradients.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
from flax import nnx

from cai_jax.model.config import ModelConfig
from cai_jax.model.experts import Kernel
from cai_jax.model.parts import Adapter, Linear
from cai_jax.model.quantized.kernel import AdaptedKernel, is_quantized
from cai_jax.model.transformer import Params, Transformer
from cai_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Which linear layers get an adapter, and its size.

  Attributes:
    rank: inner size r of an adapter, at least 1.
    alpha: the adapter's output is multiplied by alpha/r.
    modules: regular expression that is searched for in the path of each linear layer, such as
      'layers/0/attention/query' or 'layers/0/mlp/up'.

  Raises:
    UserError: if the rank is below 1, alpha is not positive, or the expression is invalid.
  """

  rank: int
  alpha: float
  modules: str

  def __post_init__(self):
    if self.rank < 1 or not self.alpha > 0:
      raise UserError(
        f'lora: rank={self.rank} must be at least 1, and alpha={self.alpha} positive.'
      )
    try:
      re.compile(self.modules)
    except re.error as error:
      raise UserError(
        f'lora: modules={self.modules!r} is not a valid regular expression: {error}.'
      ) from None

  @property
  def scale(self) -> float:
    """The factor alpha/r of an adapter's output."""
    return self.alpha / self.rank


@functools.lru_cache
def abstract_model(
  config: ModelConfig, lora: LoraConfig, dtype: str = 'float32'
) -> tuple[nnx.GraphDef, Params]:
  """Return the graph and the abstract parameters of a model with adapters.

  Args:
    config: the shape of the model.
    lora: the adapters.
    dtype: compute dtype.

  Returns:
    As `transformer.abstract_model`.

  Raises:
    UserError: if `lora.modules` matches no linear layer, or one of experts.
  """
  model = nnx.eval_shape(lambda: _build(config, lora, dtype, nnx.Rngs(0)))
  graph, state = nnx.split(model)
  return graph, nnx.to_pure_dict(state)


@functools.partial(jax.jit, static_argnums=(0, 1))
def init(config: ModelConfig, lora: LoraConfig, key: jax.Array) -> Params:
  """Draw initial adapters in f32: A is normal with standard deviation fan_in^-1/2, B is zero.

  Args:
    config: the shape of the model.
    lora: the adapters.
    key: a JAX random key.

  Returns:
    The adapters alone; `join` adds them to the parameters of a model.
  """
  model = _build(config, lora, 'float32', nnx.Rngs(params=key))
  return split(nnx.to_pure_dict(nnx.split(model)[1]))[0]


def split(params: Params) -> tuple[Params, Params]:
  """Split parameters into the adapters and the rest.

  Args:
    params: the parameters of a model with adapters.

  Returns:
    The adapters and the other parameters, as two trees.
  """
  adapters: Params = {}
  rest: Params = {}
  for key, value in params.items():
    if key == 'adapter':
      adapters[key] = value
    elif isinstance(value, dict):
      inner_adapters, inner_rest = split(value)
      adapters |= {key: inner_adapters} if inner_adapters else {}
      rest |= {key: inner_rest} if inner_rest else {}
    else:
      rest[key] = value
  return adapters, rest


def join(first: Params, second: Params) -> Params:
  """Join two trees without a common leaf into one; the inverse of `split`.

  Args:
    first: a tree of parameters.
    second: a tree of other parameters of the same model.
  """
  joined = dict(second)
  for key, value in first.items():
    joined[key] = join(value, second[key]) if key in second else value
  return joined


def merge(params: Params, adapters: Params, lora: LoraConfig) -> Params:
  """Add adapters to the kernels that they adapt: W + alpha/r · A·B.

  The result is a plain model with the logits of the adapted one.

  Args:
    params: parameters of the plain model, in any dtype.
    adapters: the adapters, in the structure that `init` returns.
    lora: the settings that the adapters were made with.

  Returns:
    The parameters of the plain model; adapted kernels are f32. A quantized one becomes an
    `AdaptedKernel`, which keeps the adapter beside it.
  """
  merged = dict(params)
  for key, value in adapters.items():
    if key == 'adapter' and is_quantized(params['kernel']):
      merged['kernel'] = AdaptedKernel(params['kernel'], value['a'], value['b'], lora.scale)
    elif key == 'adapter':
      delta = jnp.matmul(value['a'], value['b'], precision=jax.lax.Precision.HIGHEST)
      kernel = params['kernel'].astype(jnp.float32)
      merged['kernel'] = kernel + lora.scale * delta.reshape(kernel.shape)
    else:
      merged[key] = merge(params[key], value, lora)
  return merged


def _build(config: ModelConfig, lora: LoraConfig, dtype: str, rngs: nnx.Rngs) -> Transformer:
  """Return a model whose matching linear layers have adapters."""
  model = Transformer(config, rngs, jnp.dtype(dtype))
  for linear in _matching_layers(model, lora):
    linear.adapter = nnx.data(
      Adapter(linear.kernel.shape, len(linear.outs), lora.rank, lora.scale, rngs)
    )
  return model


@functools.lru_cache
def adapted_layers(config: ModelConfig, lora: LoraConfig) -> dict[str, int]:
  """Return the number of output axes of each layer with an adapter, by its path.

  Args:
    config: the shape of the model.
    lora: the adapters.

  Raises:
    UserError: as `abstract_model`.
  """
  model = nnx.eval_shape(lambda: _build(config, lora, 'float32', nnx.Rngs(0)))
  modules = {'/'.join(map(str, path)): module for path, module in nnx.iter_modules(model)}
  return {
    path: len(module.outs)
    for path, module in modules.items()
    if isinstance(module, Linear) and module.adapter is not None
  }


def _matching_layers(model: Transformer, lora: LoraConfig) -> list[Linear]:
  """Return the linear layers whose path matches `lora.modules`, in the order of the model."""
  modules = {'/'.join(map(str, path)): module for path, module in nnx.iter_modules(model)}
  for path, module in modules.items():
    if isinstance(module, Kernel) and re.search(lora.modules, path):
      raise UserError(
        f'lora: modules={lora.modules!r} matches {path!r}, but the layers of experts cannot have '
        "adapters. Set modules to 'attention/', or to another expression that matches none of them."
      )
  layers = {path: module for path, module in modules.items() if isinstance(module, Linear)}
  matching = [module for path, module in layers.items() if re.search(lora.modules, path)]
  if not matching:
    first_layer = [path for path in layers if path.startswith('layers/0/')]
    raise UserError(
      f'lora: modules={lora.modules!r} matches none of the linear layers. Those of layer 0 are '
      f'{first_layer}.'
    )
  return matching
