"""Mistral: Llama's architecture with the same attention window in every layer."""

from typing import Any

from cai_jax.model.config import ModelConfig
from cai_jax.model.families import shared, text_half
from cai_jax.model.families.family import FAMILIES, Family
from cai_jax.model.families.fields import read_flag, read_size
from cai_jax.runtime.errors import UserError, show

DEFAULT_KV_HEADS = 8  # transformers' value if config.json has no num_key_value_heads


def read_config(hf: dict[str, Any]) -> ModelConfig:
  """Return the ModelConfig of a Mistral config.json.

  A null sliding_window means no window. With attention_bias, query, key and value have biases.

  Args:
    hf: a parsed config.json.

  Raises:
    UserError: if a size is missing, or an option has a value that is not implemented.
  """
  fields = shared.read_fields(hf, default_kv_heads=DEFAULT_KV_HEADS)
  windows = read_windows(hf, fields['num_layers'])
  bias = read_flag(hf, 'attention_bias')
  return ModelConfig('mistral', **fields, qkv_bias=bias, windows=windows)


def read_windows(hf: dict[str, Any], layers: int) -> tuple[int | None, ...]:
  """Return the window of each layer; () means full attention in all of them."""
  window = None
  if hf.get('sliding_window', shared.DEFAULT_WINDOW) is not None:
    window = read_size(hf, 'sliding_window', shared.DEFAULT_WINDOW)
  kind = 'full_attention' if window is None else 'sliding_attention'
  wrong = [other for other in shared.read_layer_types(hf, layers) or () if other != kind]
  used = read_flag(hf, 'use_sliding_window', default=window is not None)
  if wrong or used != (window is not None):
    other = f'layer_types has {wrong[0]}' if wrong else f'use_sliding_window is {used}'
    raise UserError(
      f'config.json: sliding_window={window}, which holds for all layers of model_type '
      f'{show(hf.get("model_type"))}, but {other}. Correct one of them.'
    )
  return () if window is None else (window,) * layers


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
    title='Mistral, and the text half of Mistral Small 3.1 and 3.2',
    examples=('mistralai/Mistral-7B-v0.3', 'mistralai/Mistral-Small-3.2-24B-Instruct-2506'),
    multimodal={'mistral3': 'Mistral3ForConditionalGeneration'},
    prefixes=text_half.PREFIXES,
    ignored=text_half.IGNORED,
  )
)
