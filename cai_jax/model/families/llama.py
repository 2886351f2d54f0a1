"""Llama 2 and 3, and other models with their architecture, such as SmolLM2."""

from typing import Any

from cai_jax.model.config import ModelConfig
from cai_jax.model.families import shared
from cai_jax.model.families.family import FAMILIES, Family
from cai_jax.model.families.fields import read_flag


def read_config(hf: dict[str, Any]) -> ModelConfig:
  """Return the ModelConfig of a Llama config.json.

  Args:
    hf: a parsed config.json.

  Raises:
    UserError: if a size is missing, or an option has a value that is not implemented.
  """
  shared.read_no_windows(hf)
  bias = read_flag(hf, 'attention_bias')
  return ModelConfig('llama', **shared.read_fields(hf), qkv_bias=bias, output_bias=bias)


def write_config(config: ModelConfig) -> dict[str, Any]:
  """Return the entries of a Llama config.json."""
  return {**shared.write_fields(config), 'attention_bias': config.output_bias}


FAMILIES.register('llama')(
  Family(
    read_config=read_config,
    write_config=write_config,
    weights=(
      *shared.EMBEDDINGS_AND_NORMS,
      *shared.ATTENTION,
      *shared.QKV_BIASES,
      *shared.OUTPUT_BIAS,
      *shared.GATED_MLP,
    ),
    causal_lm='LlamaForCausalLM',
    classifier='LlamaForSequenceClassification',
    title='Llama 2 and 3, SmolLM2, TinyLlama and others with this architecture',
    examples=('meta-llama/Llama-3.1-8B-Instruct', 'HuggingFaceTB/SmolLM2-1.7B-Instruct'),
  )
)
