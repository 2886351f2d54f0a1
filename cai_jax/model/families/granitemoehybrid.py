"""Granite 4 without experts and state-space layers: Granite 3 with one tensor for gate and up."""

from typing import Any

from cai_jax.model.config import ModelConfig
from cai_jax.model.families import granite, shared
from cai_jax.model.families.family import FAMILIES, Family
from cai_jax.model.families.fields import read_flag, read_size
from cai_jax.model.families.weight_table import Weight
from cai_jax.runtime.errors import UserError, show

DEFAULT_EXPERTS = 8  # transformers' value if config.json has no num_local_experts
DEFAULT_WIDTH = 1024  # transformers' value if config.json has no shared_intermediate_size
ATTENTION = ('attention', 'full_attention')  # the names of transformers 4 and 5
UNROTATED = (None, 'nope')  # values of position_embedding_type


def read_config(hf: dict[str, Any]) -> ModelConfig:
  """Return the ModelConfig of a Granite 4 config.json.

  Args:
    hf: a parsed config.json.

  Raises:
    UserError: if the model has experts or state-space layers, a size is missing, or an option has a
      value that is not implemented.
  """
  width = read_size(hf, 'shared_intermediate_size', DEFAULT_WIDTH)
  fields = shared.read_fields({**hf, 'intermediate_size': width})
  layers = fields['num_layers']
  _check_dense(hf, layers)
  position = hf.get('position_embedding_type')
  if position not in (*UNROTATED, 'rope'):
    raise UserError(
      f'config.json: position_embedding_type={show(position)} is not supported; "rope", "nope" and '
      'null are.'
    )
  bias = read_flag(hf, 'attention_bias')
  return ModelConfig(
    'granitemoehybrid',
    **fields,
    **granite.read_multipliers(hf, fields['head_dim']),
    qkv_bias=bias,
    output_bias=bias,
    ropes=(None,) * layers if position in UNROTATED else (),
  )


def _check_dense(hf: dict[str, Any], layers: int) -> None:
  """Check that the model has neither experts nor state-space layers.

  Args:
    hf: a parsed config.json.
    layers: number of layers.

  Raises:
    UserError: if it has.
  """
  experts = read_size(hf, 'num_local_experts', DEFAULT_EXPERTS, smallest=0)
  key = 'layers_block_type' if hf.get('layer_types') is None else 'layer_types'
  kinds = hf.get(key)
  if isinstance(kinds, list) and len(kinds) == layers:
    other = [kind for kind in kinds if kind not in ATTENTION]
    found = f'{key} has {show(other[0])}' if other else ''
  else:
    found = f'{key} is {show(kinds)}, which gives no "attention" for each layer'
  if experts:
    found = f'num_local_experts is {experts}'
  if found:
    raise UserError(
      f'config.json: {found}. Of model_type granitemoehybrid, only models without experts and '
      'state-space (Mamba) layers are supported. Use one of them, such as '
      'ibm-granite/granite-4.0-micro.'
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
  """Return the entries of a Granite 4 config.json."""
  return {
    **shared.write_fields(config),
    **granite.write_multipliers(config),
    'attention_bias': config.output_bias,
    'shared_intermediate_size': config.d_ff,
    'num_local_experts': 0,
    'layer_types': ['full_attention'] * config.num_layers,
    'position_embedding_type': None if config.ropes else 'rope',
    'mamba_n_heads': 1,  # transformers checks that it divides a size, without such layers too
  }


FAMILIES.register('granitemoehybrid')(
  Family(
    read_config=read_config,
    write_config=write_config,
    weights=(
      *shared.EMBEDDINGS_AND_NORMS,
      *shared.ATTENTION,
      *shared.QKV_BIASES,
      *shared.OUTPUT_BIAS,
      *shared.per_layer(
        Weight('mlp/gate/kernel', 'shared_mlp.input_linear.weight', 'DF->+F,D'),
        Weight('mlp/up/kernel', 'shared_mlp.input_linear.weight', 'DF->+F,D'),
        Weight('mlp/down/kernel', 'shared_mlp.output_linear.weight', 'FD->D,F'),
      ),
    ),
    causal_lm='GraniteMoeHybridForCausalLM',
    classifier=None,
    title='Granite 4 without experts and state-space layers',
    examples=('ibm-granite/granite-4.0-micro', 'ibm-granite/granite-4.0-350m'),
    options=(*granite.OPTIONS, 'num_local_experts', 'shared_intermediate_size'),
    sizes={'F': 'shared_intermediate_size'},
  )
)
