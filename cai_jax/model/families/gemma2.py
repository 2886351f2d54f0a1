"""Gemma 2: norms before and after each layer, capped scores and logits, windows in some layers.

What Gemma 3 has in common with it is in `read_fields`, `write_fields` and `WEIGHTS`.
"""

from collections.abc import Mapping
from typing import Any

from cai_jax.model.config import ModelConfig
from cai_jax.model.families import shared
from cai_jax.model.families.family import FAMILIES, Family
from cai_jax.model.families.fields import read_flag, read_number, read_size, require
from cai_jax.model.families.weight_table import Weight
from cai_jax.runtime.errors import UserError

# Transformers' values of entries that config.json does not have.
DEFAULTS = {
  'vocab_size': 256_000,
  'num_attention_heads': 8,
  'num_key_value_heads': 4,
  'head_dim': 256,
  'max_position_embeddings': 8192,
  'tie_word_embeddings': True,
}
CAPS = {'attn_logit_softcapping': 50.0, 'final_logit_softcapping': 30.0}
OPTIONS = ('query_pre_attn_scalar', *CAPS)
DEFAULT_QUERY_SCALAR = 256  # transformers' value if config.json has no query_pre_attn_scalar
ACTIVATION = 'gelu_pytorch_tanh'

WEIGHTS = (
  *shared.EMBEDDINGS,
  *shared.per_layer(
    Weight('attention_norm/scale', 'input_layernorm.weight', 'D->D'),
    Weight('attention_post_norm/scale', 'post_attention_layernorm.weight', 'D->D'),
    Weight('mlp_norm/scale', 'pre_feedforward_layernorm.weight', 'D->D'),
    Weight('mlp_post_norm/scale', 'post_feedforward_layernorm.weight', 'D->D'),
  ),
  *shared.ATTENTION,
  *shared.QKV_BIASES,
  *shared.OUTPUT_BIAS,
  *shared.GATED_MLP,
)


def read_fields(
  hf: Mapping[str, Any],
  kinds: list[str],
  defaults: Mapping[str, Any],
  caps: Mapping[str, float | None],
) -> dict[str, Any]:
  """Return the fields of ModelConfig that Gemma 2 and 3 store in the same way.

  Args:
    hf: a parsed config.json.
    kinds: type of each layer, as `read_kinds` returns it.
    defaults: values of absent entries.
    caps: the two caps if their entries are absent. A null entry means no cap.

  Raises:
    UserError: if a size is missing, or an option has a value that is not implemented.
  """
  require(hf, 'hidden_activation', ACTIVATION, 'gelu_new')  # two names of the same function
  stated = {key: value for key, value in hf.items() if value is not None}
  stated.pop('hidden_act', None)  # old files have it beside hidden_activation, and no one reads it
  fields = shared.read_fields({**defaults, **stated})
  scalar = read_size(hf, 'query_pre_attn_scalar', DEFAULT_QUERY_SCALAR)
  limits = {**caps, **{key: hf[key] for key in caps if key in hf}}
  attention_cap, logit_cap = (
    None if limits[key] is None else read_number(limits, key) for key in CAPS
  )
  bias = read_flag(hf, 'attention_bias')
  return fields | {
    'qkv_bias': bias,
    'output_bias': bias,
    'windows': read_windows(hf, kinds),
    'norm_offset': 1.0,
    'post_norm': True,
    'activation': 'gelu_tanh',
    'query_scale': None if scalar == fields['head_dim'] else scalar**-0.5,
    'attention_cap': attention_cap,
    'embedding_scale': fields['d_model'] ** 0.5,
    'logit_cap': logit_cap,
  }


def read_kinds(hf: Mapping[str, Any], period: int) -> list[str]:
  """Return the type of each layer: that of layer_types, or full attention in every n-th layer.

  Args:
    hf: a parsed config.json.
    period: n.

  Raises:
    UserError: if layer_types is not a list of a known type for each layer.
  """
  layers = read_size(hf, 'num_hidden_layers', largest=shared.MOST_LAYERS)
  full, windowed = shared.LAYER_TYPES
  by_number = [windowed if (layer + 1) % period else full for layer in range(layers)]
  return shared.read_layer_types(dict(hf), layers) or by_number


def read_windows(hf: Mapping[str, Any], kinds: list[str]) -> tuple[int | None, ...]:
  """Return `windows` of ModelConfig.

  Args:
    hf: a parsed config.json.
    kinds: type of each layer, as `read_kinds` returns it.

  Raises:
    UserError: if layers have a window and config.json gives null for its size.
  """
  if shared.LAYER_TYPES[1] not in kinds:
    return ()
  if 'sliding_window' in hf and hf['sliding_window'] is None:
    raise UserError(
      'config.json: sliding_window is None, but some layers have sliding_attention. Give the '
      'window in tokens, or set layer_types to full_attention in all layers.'
    )
  window = read_size(hf, 'sliding_window', shared.DEFAULT_WINDOW)
  return tuple(window if kind == shared.LAYER_TYPES[1] else None for kind in kinds)


def write_fields(config: ModelConfig) -> dict[str, Any]:
  """Return the entries of config.json that `read_kinds` and `read_fields` read."""
  scale = config.query_scale
  hf = shared.write_fields(config)
  del hf['hidden_act']
  return hf | {
    'hidden_activation': ACTIVATION,
    'query_pre_attn_scalar': config.head_dim if scale is None else round(scale**-2),
    'attn_logit_softcapping': config.attention_cap,
    'final_logit_softcapping': config.logit_cap,
    'attention_bias': config.output_bias,
    **write_windows(config),
  }


def write_windows(config: ModelConfig) -> dict[str, Any]:
  """Return the entries of config.json that `read_kinds` and `read_windows` read."""
  return {
    'sliding_window': next((w for w in config.windows if w), shared.DEFAULT_WINDOW),
    'layer_types': shared.write_layer_types(config),
  }


def read_config(hf: dict[str, Any]) -> ModelConfig:
  """Return the ModelConfig of a Gemma 2 config.json.

  Args:
    hf: a parsed config.json.

  Raises:
    UserError: if a size is missing, or an option has a value that is not implemented.
  """
  return ModelConfig('gemma2', **read_fields(hf, read_kinds(hf, 2), DEFAULTS, CAPS))


FAMILIES.register('gemma2')(
  Family(
    read_config=read_config,
    write_config=write_fields,
    weights=WEIGHTS,
    causal_lm='Gemma2ForCausalLM',
    classifier='Gemma2ForSequenceClassification',
    title='Gemma 2',
    examples=('google/gemma-2-9b-it',),
    options=OPTIONS,
  )
)
