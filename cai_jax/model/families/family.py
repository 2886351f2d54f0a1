"""The interface of model families: how they map config.json and weights, in both directions.

To add a family, register a `Family` in a new file of this folder, or in a file of your own that
`config.plugins` names. `llama.py` is an example.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cai_jax.model.config import ModelConfig
from cai_jax.model.families.fields import require
from cai_jax.runtime.errors import UserError, show
from cai_jax.runtime.registry import Registry

_LAYER = re.compile(r'layers/(\d+)/')
# The entries of config.json that give the size of each axis.
_SIZES = {
  'V': 'vocab_size',
  'D': 'hidden_size',
  'F': 'intermediate_size',
  'N': 'num_attention_heads',
  'K': 'num_key_value_heads',
  'H': 'head_dim',
}


class Weight(NamedTuple):
  """One row of a weight table: a parameter of ours and the Hugging Face tensor that holds it.

  Attributes:
    path: our path, with `{}` for the number of the layer: 'layers/{}/attention/query/kernel'.
    name: Hugging Face's name, with `{}` as above: 'model.layers.{}.self_attn.q_proj.weight'.
    axes: our axes and the tensor's: 'DNH->NH,D'. Commas separate the axes of the tensor. Letters
      without a comma between them are axes of ours that the tensor merges into one.
      `cai_jax.model.transformer` defines the letters.
  """

  path: str
  name: str
  axes: str


@dataclasses.dataclass(frozen=True)
class StoredWeight:
  """The Hugging Face tensor that holds one of our parameters, and its layout.

  Attributes:
    name: the tensor's name, such as 'model.layers.0.mlp.up_proj.weight'.
    groups: for each axis of the tensor, the indices of our axes that are merged into it.
  """

  name: str
  groups: tuple[tuple[int, ...], ...]

  def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the tensor for a parameter of a given shape.

    Args:
      shape: shape of our parameter.
    """
    return tuple(math.prod(shape[axis] for axis in group) for group in self.groups)

  def to_stored(self, x: np.ndarray) -> np.ndarray:
    """Return our parameter in the layout of the tensor, contiguous in memory.

    Args:
      x: our parameter.
    """
    order = [axis for group in self.groups for axis in group]
    # safetensors writes the buffer of a strided array as it is, so the array must be contiguous.
    return np.ascontiguousarray(x.transpose(order).reshape(self.shape(x.shape)))

  def read_block(
    self, tensor: Any, shape: tuple[int, ...], starts: tuple[int, ...], stops: tuple[int, ...]
  ) -> np.ndarray:
    """Read the block [starts, stops) of our parameter, and no more rows of the tensor than needed.

    Args:
      tensor: a slice object of safetensors.
      shape: shape of the whole parameter.
      starts: first index of the block on each of our axes.
      stops: end of the block on each of our axes.

    Returns:
      The block in our layout. Where the tensor merges several of our axes, the first is sliced in
      the file and the others in memory.
    """
    region, block, within = [], [], []
    for first, *rest in self.groups:
      row = math.prod(shape[axis] for axis in rest)
      region.append(slice(starts[first] * row, stops[first] * row))
      block += [stops[first] - starts[first], *(shape[axis] for axis in rest)]
      within += [slice(None), *(slice(starts[axis], stops[axis]) for axis in rest)]
    order = [axis for group in self.groups for axis in group]
    return tensor[tuple(region)].reshape(block)[tuple(within)].transpose(np.argsort(order))


@dataclasses.dataclass(frozen=True)
class Family:
  """A model family: how Hugging Face stores the config and the weights of its models.

  Attributes:
    read_config: returns the ModelConfig of a parsed config.json; raises UserError for an option
      that is not implemented.
    write_config: returns the entries of config.json that describe a ModelConfig. `config_to_hf`
      adds model_type and architectures, and checks that reading gives the same ModelConfig.
    weights: the weight table. A model uses the rows for the parameters that it has.
    causal_lm: transformers' class for language models, such as 'LlamaForCausalLM'.
    classifier: transformers' class for sequence classification.
  """

  read_config: Callable[[dict[str, Any]], ModelConfig]
  write_config: Callable[[ModelConfig], dict[str, Any]]
  weights: tuple[Weight, ...]
  causal_lm: str
  classifier: str

  def find_weight(self, path: str) -> StoredWeight:
    """Return the tensor that holds the parameter at a path, and its layout.

    Args:
      path: such as 'layers/0/mlp/up/kernel'.

    Raises:
      ValueError: if the weight table has no such parameter.
    """
    weight = self._find_row(path)
    ours, theirs = weight.axes.split('->')
    groups = tuple(tuple(ours.index(letter) for letter in axis) for axis in theirs.split(','))
    layer = _LAYER.match(path)
    name = weight.name if layer is None else weight.name.format(layer[1])
    return StoredWeight(name, groups)

  def describe_shape(self, path: str) -> str:
    """Return the entries of config.json that give the shape of a parameter's tensor.

    Args:
      path: such as 'layers/0/mlp/up/kernel'.

    Returns:
      Such as 'intermediate_size, hidden_size', with × between factors of one axis.
    """
    theirs = self._find_row(path).axes.split('->')[1]
    return ', '.join(' × '.join(_SIZES[letter] for letter in axis) for axis in theirs.split(','))

  def _find_row(self, path: str) -> Weight:
    """Return the row of the weight table for the parameter at a path."""
    layer = _LAYER.match(path)
    general = path if layer is None else f'layers/{{}}/{path[layer.end() :]}'
    rows = [weight for weight in self.weights if weight.path == general]
    if len(rows) != 1:
      raise ValueError(f'{len(rows)} rows of the weight table have the path {general!r}, not one.')
    return rows[0]


FAMILIES: Registry[Family] = Registry('model family')


# Options of other architectures that change what a model computes, and the values with which they
# do not. Transformers ignores some of them for our families, and other programs do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
  'is_encoder_decoder': (False,),
  'add_cross_attention': (False,),
  'is_causal': (True,),
  'use_bidirectional_attention': (False,),
  'pruned_heads': ({},),
  'attn_logit_softcapping': (),
  'final_logit_softcapping': (),
  'query_pre_attn_scalar': (),
  'attention_multiplier': (),
  'embedding_multiplier': (1.0,),
  'residual_multiplier': (1.0,),
  'logits_scaling': (1.0,),
  'logit_scale': (1.0,),
  'attention_chunk_size': (),
  'no_rope_layers': ([],),
  'no_rope_layer_interval': (),
  'clip_qkv': (),
  'alibi': (False,),
  'use_alibi': (False,),
  'use_mrope': (False,),
  'rotary_pct': (1.0,),
  'rope_interleaved': (False,),
  'parallel_attn': (False,),
  'use_parallel_residual': (False,),
}


def config_from_hf(hf: dict[str, Any]) -> ModelConfig:
  """Return the ModelConfig of a parsed Hugging Face config.json.

  Raises:
    UserError: if the family, or an option such as the activation, is not implemented.
  """
  model_type = hf.get('model_type')
  if not isinstance(model_type, str) or model_type not in FAMILIES:
    raise UserError(
      f'config.json: model_type {model_type!r} is not supported. The supported types are '
      f'{", ".join(sorted(FAMILIES))}. To add a family, register it in a file of your own and name '
      'that file in config.plugins.'
    )
  for key in ('quantization_config', 'compression_config'):
    if (method := hf.get(key)) is not None:
      raise UserError(
        f'config.json: {key}={show(method)} is not supported. Use the original checkpoint.'
      )
  for key, neutral in NEUTRAL.items():
    require(hf, key, *neutral)
  return FAMILIES[model_type].read_config(hf)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
  """Return the Hugging Face config.json of a model; the inverse of `config_from_hf`.

  Raises:
    UserError: if the family's config.json cannot describe the model.
  """
  family = FAMILIES[config.family]
  hf = {'architectures': [family.causal_lm], 'model_type': config.family}
  hf |= family.write_config(config)
  if (read_back := config_from_hf(hf)) != config:
    name = next(
      field.name
      for field in dataclasses.fields(config)
      if getattr(read_back, field.name) != getattr(config, field.name)
    )
    raise UserError(
      f'{name}={getattr(config, name)!r} cannot be written to the config.json of a {config.family} '
      f'model: it would be read back as {getattr(read_back, name)!r}.'
    )
  return hf
