"""Gemma 3: Gemma 2 with norms on queries and keys, and other rotary positions where windows are.

The family also reads the text half of multimodal checkpoints.
"""

from typing import Any

from cai_jax.model.config import ModelConfig
from cai_jax.model.families import gemma2, shared, text_half
from cai_jax.model.families.family import FAMILIES, Family
from cai_jax.model.families.fields import read_size
from cai_jax.model.families.rope import (
  ROPE_ENTRIES,
  RopeEntries,
  read_layer_ropes,
  write_layer_ropes,
)

# Transformers' values of entries that config.json does not have.
DEFAULTS = {**gemma2.DEFAULTS, 'vocab_size': 262_208, 'max_position_embeddings': 131_072}
DEFAULT_PERIOD = 6  # one layer of six has full attention
ROPES = {
  'full_attention': RopeEntries(theta=1e6),
  'sliding_attention': RopeEntries(theta=1e4, theta_key='rope_local_base_freq', objects=()),
}


def read_config(hf: dict[str, Any]) -> ModelConfig:
  """Return the ModelConfig of a Gemma 3 config.json.

  Args:
    hf: a parsed config.json.

  Raises:
    UserError: if a size is missing, or an option has a value that is not implemented.
  """
  kinds = gemma2.read_kinds(hf, read_size(hf, 'sliding_window_pattern', DEFAULT_PERIOD))
  others = {key: value for key, value in hf.items() if key not in ROPE_ENTRIES}
  fields = gemma2.read_fields(others, kinds, DEFAULTS, dict.fromkeys(gemma2.CAPS))
  fields |= read_layer_ropes(hf, fields['head_dim'], kinds, ROPES)
  return ModelConfig('gemma3_text', **fields, qk_norm=True)


def write_config(config: ModelConfig) -> dict[str, Any]:
  """Return the entries of a Gemma 3 config.json."""
  hf = gemma2.write_fields(config)
  hf = {key: value for key, value in hf.items() if key not in ROPE_ENTRIES}
  return hf | write_layer_ropes(config, hf['layer_types'], ROPES)


FAMILIES.register('gemma3_text')(
  Family(
    read_config=read_config,
    write_config=write_config,
    weights=(*gemma2.WEIGHTS, *shared.QK_NORMS),
    causal_lm='Gemma3ForCausalLM',
    classifier='Gemma3TextForSequenceClassification',
    title='Gemma 3, and the text half of the multimodal models',
    examples=('google/gemma-3-270m-it', 'google/gemma-3-4b-it'),
    options=(*gemma2.OPTIONS, 'rope_local_base_freq'),
    multimodal={'gemma3': 'Gemma3ForConditionalGeneration'},
    prefixes=text_half.PREFIXES,
    ignored=text_half.IGNORED,
  )
)
