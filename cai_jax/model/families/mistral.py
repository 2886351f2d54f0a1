"""Mistral: Llama's architecture with the same attention window in every layer."""

from typing import Any

from cai_jax.model.config import ModelConfig
from cai_jax.model.families import shared
from cai_jax.model.families.family import FAMILIES, Family

DEFAULT_WINDOW = 4096  # tokens; transformers' value if config.json has no sliding_window


def read_config(hf: dict[str, Any]) -> ModelConfig:
  """Return the ModelConfig of a Mistral config.json.

  A null sliding_window means no window. With attention_bias, query, key and value have biases.

  Args:
    hf: a parsed config.json.

  Raises:
    UserError: if a size is missing, or an option has a value that is not implemented.
  """
  window = hf.get('sliding_window', DEFAULT_WINDOW)
  fields = shared.read_fields(hf)
  windows = () if window is None else (window,) * fields['num_layers']
  bias = bool(hf.get('attention_bias', False))
  return ModelConfig('mistral', **fields, qkv_bias=bias, windows=windows)


def write_config(config: ModelConfig) -> dict[str, Any]:
  """Return the entries of a Mistral config.json."""
  window = config.windows[0] if config.windows else None
  hf = {**shared.write_fields(config), 'sliding_window': window}
  return hf | ({'attention_bias': True} if config.qkv_bias else {})


FAMILIES.register('mistral')(
  Family(
    read_config=read_config,
    write_config=write_config,
    weights=(
      *shared.EMBEDDINGS_AND_NORMS,
      *shared.ATTENTION,
      *shared.QKV_BIASES,
      *shared.GATED_MLP,
    ),
    causal_lm='MistralForCausalLM',
    classifier='MistralForSequenceClassification',
  )
)
