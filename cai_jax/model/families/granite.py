"""Granite 3: Llama's architecture with multipliers of embeddings, scores, layers and logits.

What Granite 4 has in common with it is in `read_multipliers` and `write_multipliers`.
"""

from typing import Any

from cai_jax.model.config import ModelConfig
from cai_jax.model.families import shared
from cai_jax.model.families.family import FAMILIES, Family
from cai_jax.model.families.fields import read_flag, read_number

# Each multiplier is 1 if config.json does not have it. That of the scores replaces head_dim^-1/2.
OPTIONS = (
  'attention_multiplier',
  'embedding_multiplier',
  'residual_multiplier',
  'logits_scaling',
)


def read_multipliers(hf: dict[str, Any], head_dim: int) -> dict[str, Any]:
  """Return the fields of ModelConfig for Granite's multipliers.

  Args:
    hf: a parsed config.json.
    head_dim: channels of a head.

  Raises:
    UserError: if a multiplier is not a positive number.
  """
  scale, embedding, residual, logits = (read_number(hf, key, 1.0) for key in OPTIONS)
  return {
    'query_scale': None if scale == head_dim**-0.5 else scale,
    'embedding_scale': embedding,
    'residual_scale': residual,
    'logit_divisor': logits,
  }


def write_multipliers(config: ModelConfig) -> dict[str, Any]:
  """Return the entries of config.json that `read_multipliers` reads."""
  scale = config.query_scale
  return {
    'attention_multiplier': config.head_dim**-0.5 if scale is None else scale,
    'embedding_multiplier': config.embedding_scale,
    'residual_multiplier': config.residual_scale,
    'logits_scaling': config.logit_divisor,
  }


def read_config(hf: dict[str, Any]) -> ModelConfig:
  """Return the ModelConfig of a Granite 3 config.json.

  Args:
    hf: a parsed config.json.

  Raises:
    UserError: if a size is missing, or an option has a value that is not implemented.
  """
  shared.read_no_windows(hf)
  fields = shared.read_fields({**hf, 'mlp_bias': False})
  bias = read_flag(hf, 'attention_bias')
  return ModelConfig(
    'granite',
    **fields,
    **read_multipliers(hf, fields['head_dim']),
    qkv_bias=bias,
    output_bias=bias,
    mlp_bias=read_flag(hf, 'mlp_bias'),
  )


def write_config(config: ModelConfig) -> dict[str, Any]:
  """Return the entries of a Granite 3 config.json."""
  return {
    **shared.write_fields(config),
    **write_multipliers(config),
    'attention_bias': config.output_bias,
    'mlp_bias': config.mlp_bias,
  }


FAMILIES.register('granite')(
  Family(
    read_config=read_config,
    write_config=write_config,
    weights=(
      *shared.EMBEDDINGS_AND_NORMS,
      *shared.ATTENTION,
      *shared.QKV_BIASES,
      *shared.OUTPUT_BIAS,
      *shared.GATED_MLP,
      *shared.MLP_BIASES,
    ),
    causal_lm='GraniteForCausalLM',
    classifier=None,
    title='Granite 3',
    examples=('ibm-granite/granite-3.3-2b-instruct',),
    options=OPTIONS,
  )
)
