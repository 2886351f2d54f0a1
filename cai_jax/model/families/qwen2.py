"""Qwen2 and Qwen2.5: biases on query, key and value, and optional windows in some layers."""

from typing import Any

from cai_jax.model.config import ModelConfig
from cai_jax.model.families import shared
from cai_jax.model.families.family import FAMILIES, Family

DEFAULT_KV_HEADS = 32  # transformers' value if config.json has no num_key_value_heads


def read_config(hf: dict[str, Any]) -> ModelConfig:
  """Return the ModelConfig of a Qwen2 config.json.

  Args:
    hf: a parsed config.json.

  Raises:
    UserError: if a size is missing, or an option has a value that is not implemented.
  """
  fields = shared.read_fields(hf, default_kv_heads=DEFAULT_KV_HEADS)
  return ModelConfig('qwen2', **fields, qkv_bias=True, windows=shared.read_layer_windows(hf))


def write_config(config: ModelConfig) -> dict[str, Any]:
  """Return the entries of a Qwen2 config.json."""
  return {**shared.write_fields(config), **shared.write_layer_windows(config)}


FAMILIES.register('qwen2')(
  Family(
    read_config=read_config,
    write_config=write_config,
    weights=(
      *shared.EMBEDDINGS_AND_NORMS,
      *shared.ATTENTION,
      *shared.QKV_BIASES,
      *shared.GATED_MLP,
    ),
    causal_lm='Qwen2ForCausalLM',
    classifier='Qwen2ForSequenceClassification',
    title='Qwen2 and Qwen2.5',
    examples=('Qwen/Qwen2.5-7B-Instruct',),
  )
)
