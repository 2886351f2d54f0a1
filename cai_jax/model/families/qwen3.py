"""Qwen3: norms on each head's query and key, and optional windows in some layers."""

from typing import Any

from cai_jax.model.config import ModelConfig
from cai_jax.model.families import shared
from cai_jax.model.families.family import FAMILIES, Family
from cai_jax.model.families.fields import read_flag

DEFAULT_HEAD_DIM = 128  # transformers' value if config.json has no head_dim
DEFAULT_KV_HEADS = 32  # transformers' value if config.json has no num_key_value_heads


def read_config(hf: dict[str, Any]) -> ModelConfig:
  """Return the ModelConfig of a Qwen3 config.json.

  Args:
    hf: a parsed config.json.

  Raises:
    UserError: if a size is missing, or an option has a value that is not implemented.
  """
  bias = read_flag(hf, 'attention_bias')
  return ModelConfig(
    'qwen3',
    **shared.read_fields(hf, DEFAULT_HEAD_DIM, DEFAULT_KV_HEADS),
    qkv_bias=bias,
    output_bias=bias,
    qk_norm=True,
    windows=shared.read_layer_windows(hf),
  )


def write_config(config: ModelConfig) -> dict[str, Any]:
  """Return the entries of a Qwen3 config.json."""
  return {
    **shared.write_fields(config),
    'attention_bias': config.output_bias,
    **shared.write_layer_windows(config),
  }


FAMILIES.register('qwen3')(
  Family(
    read_config=read_config,
    write_config=write_config,
    weights=(
      *shared.EMBEDDINGS_AND_NORMS,
      *shared.ATTENTION,
      *shared.QKV_BIASES,
      *shared.OUTPUT_BIAS,
      *shared.QK_NORMS,
      *shared.GATED_MLP,
    ),
    causal_lm='Qwen3ForCausalLM',
    classifier='Qwen3ForSequenceClassification',
    title='Qwen3',
    examples=('Qwen/Qwen3-8B',),
  )
)
