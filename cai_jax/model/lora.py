"""Low-rank adaptation (LoRA; Hu et al. 2021): W·x + alpha/r · B·A·x, of which A and B are learnt.

Libraries that add adapters from outside (such as qwix) find a weight by watching which array enters
which product. Here a kernel has several axes, is reshaped and cast on its way, and half-precision
products have gradients of their own; so the adapter is a part of `Linear` instead.
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cai_jax.model.config import ModelConfig
from cai_jax.model.transformer import Adapter, Linear, Transformer
from cai_jax.runtime.errors import UserError

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Which linear layers are adapted, and how.

  Attributes:
    rank: of an adapter, r; 0 is no adapters at all.
    alpha: an adapter counts alpha/r.
    modules: regular expression, searched in the path of each linear layer, such as
      'layers/0/attention/query' or 'layers/0/mlp/up'.
  """

  rank: int = 0
  alpha: float = 16.0
  modules: str = 'attention/|mlp/'

  def __post_init__(self):
    if self.rank < 0 or not self.alpha > 0:
      raise UserError(
        f'lora: rank={self.rank} must be at least 0, and alpha={self.alpha} positive.'
      )
    try:
      re.compile(self.modules)
    except re.error as error:
      raise UserError(
        f'lora: modules={self.modules!r} is no regular expression: {error}.'
      ) from None

  @property
  def scale(self) -> float:
    """What an adapter's product is multiplied by."""
    return self.alpha / self.rank


def _linears(model: Transformer, config: LoraConfig) -> list[tuple[str, Linear]]:
  found = [
    ('/'.join(map(str, path)), module)
    for path, module in nnx.iter_modules(model)
    if isinstance(module, Linear)
  ]
  chosen = [(path, module) for path, module in found if re.search(config.modules, path)]
  if not chosen:
    raise UserError(
      f'lora: modules={config.modules!r} matches none of the linear layers; those of layer 0 are '
      f'{[path for path, _ in found if path.startswith("layers/0/")]}.'
    )
  return chosen


def _adapted(config: ModelConfig, lora: LoraConfig, dtype: str, rngs: nnx.Rngs) -> Transformer:
  model = Transformer(config, rngs, jnp.dtype(dtype))
  for _, module in _linears(model, lora):
    shape, outs = module.kernel.shape, len(module.outs)
    module.adapter = nnx.data(Adapter(shape, outs, lora.rank, lora.scale, rngs))
  return model


@functools.lru_cache
def structure(
  config: ModelConfig, lora: LoraConfig, dtype: str = 'float32'
) -> tuple[nnx.GraphDef, Params]:
  """Graph and parameters of an adapted model, as `weights.structure`.

  Raises:
    ValueError: if `lora.modules` matches no linear layer.
  """
  model = nnx.eval_shape(lambda: _adapted(config, lora, dtype, nnx.Rngs(0)))
  graph, state = nnx.split(model)
  return graph, nnx.to_pure_dict(state)


@functools.partial(jax.jit, static_argnums=(0, 1))
def init(config: ModelConfig, lora: LoraConfig, key: jax.Array) -> Params:
  """First adapters, f32: A is normal with standard deviation fan_in^-1/2, B is zero.

  The tree has the adapters alone; `join` puts them beside a model's parameters.
  """
  model = _adapted(config, lora, 'float32', nnx.Rngs(params=key))
  return split(nnx.to_pure_dict(nnx.split(model)[1]))[0]


def split(params: Params) -> tuple[Params, Params]:
  """(adapters, all else) of an adapted model's parameters."""
  adapters, rest = {}, {}
  for key, value in params.items():
    if key == 'adapter':
      adapters[key] = value
    elif isinstance(value, dict):
      below, others = split(value)
      adapters |= {key: below} if below else {}
      rest |= {key: others} if others else {}
    else:
      rest[key] = value
  return adapters, rest


def join(first: Params, second: Params) -> Params:
  """One tree of two that have no leaf in common; the inverse of `split`."""
  joined = dict(second)
  for key, value in first.items():
    joined[key] = join(value, second[key]) if key in second else value
  return joined


def merge(params: Params, adapters: Params, lora: LoraConfig) -> Params:
  """Parameters of the plain model that gives the adapted one's logits: W + alpha/r · A·B.

  Args:
    params: of the plain model, in any dtype; those adapted come back in f32.
    adapters: as `init` makes them.
    lora: what they were made with.
  """
  merged = dict(params)
  for key, value in adapters.items():
    if key == 'adapter':
      product = jnp.matmul(value['a'], value['b'], precision=jax.lax.Precision.HIGHEST)
      kernel = params['kernel'].astype(jnp.float32)
      merged['kernel'] = kernel + lora.scale * product.reshape(kernel.shape)
    else:
      merged[key] = merge(params[key], value, lora)
  return merged
