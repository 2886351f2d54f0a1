"""Gemma 4: Gemma 3 with larger and fewer heads where attention is full, and normed values.

The family reads dense models, also the text half of multimodal checkpoints. What E2B, E4B and the
mixtures of experts have besides is refused.
"""

from collections.abc import Mapping
from typing import Any

from cai_jax.model.config import ModelConfig
from cai_jax.model.families import gemma2, gemma3_text, shared, text_half
from cai_jax.model.families.family import FAMILIES, Family
from cai_jax.model.families.fields import read_flag, read_size, require
from cai_jax.model.families.rope import ROPE_ENTRIES, read_layer_ropes, write_layer_ropes
from cai_jax.model.families.weight_table import Weight
from cai_jax.runtime.errors import UserError, show

FULL, SLIDING = shared.LAYER_TYPES
# Transformers' values of entries that config.json does not have.
DEFAULTS = {
  **gemma2.DEFAULTS,
  'vocab_size': 262_144,
  'max_position_embeddings': 131_072,
  'sliding_window': 512,
}
DEFAULT_FULL_HEAD_DIM = 512
DEFAULT_ROPES = {
  SLIDING: {'rope_type': 'default', 'rope_theta': 1e4},
  FULL: {'rope_type': 'proportional', 'rope_theta': 1e6, 'partial_rotary_factor': 0.25},
}
# Entries of what is not implemented, with transformers' defaults.
MISSING = {
  'hidden_size_per_layer_input': ('per-layer embeddings', 256),
  'num_kv_shared_layers': ('keys and values shared across layers', 0),
  'num_experts': ('mixtures of experts', 0),
}
MISSING_FLAGS = {
  'use_double_wide_mlp': 'double-wide feed-forward layers',
  'enable_moe_block': 'mixtures of experts beside a feed-forward layer',
}
HEADS = ('global_head_dim', 'num_global_key_value_heads', 'per_layer_config')
OVERRIDES = ('head_dim', 'num_key_value_heads')  # of per_layer_config


def read_config(hf: dict[str, Any]) -> ModelConfig:
  """Return the ModelConfig of a Gemma 4 config.json.

  Args:
    hf: a parsed config.json.

  Raises:
    UserError: if a size is missing, or an option has a value that is not implemented.
  """
  _check_implemented(hf)
  # The tokens of images see each other; those of a text see only earlier ones.
  require(hf, 'use_bidirectional_attention', False, 'vision')
  kinds = [*gemma2.read_kinds(hf, gemma3_text.DEFAULT_PERIOD)[:-1], FULL]  # the last is always full
  others = {key: value for key, value in hf.items() if key not in ROPE_ENTRIES}
  others = {'sliding_window': DEFAULTS['sliding_window'], **others}
  fields = gemma2.read_fields(others, kinds, DEFAULTS, dict.fromkeys(gemma2.CAPS))
  from_keys = read_flag(hf, 'attention_k_eq_v')
  heads = {FULL: _read_full_heads(hf, kinds, fields['head_dim'], fields['num_kv_heads'], from_keys)}
  heads[SLIDING] = fields['head_dim'], fields['num_kv_heads']
  head_dims, kv_heads = zip(*(heads[kind] for kind in kinds), strict=True)
  ropes = hf.get('rope_parameters') or {}
  if isinstance(ropes, Mapping):
    hf = {**hf, 'rope_parameters': {**DEFAULT_ROPES, **ropes}}
  fields |= read_layer_ropes(hf, fields['head_dim'], kinds, gemma3_text.ROPES)
  fields |= {
    'norm_offset': 0.0,
    'query_scale': 1.0,
    'qk_norm': True,
    'value_norm': True,
    'values_from_keys': tuple(kind == FULL for kind in kinds) if from_keys else (),
    'head_dims': head_dims if {*head_dims} != {fields['head_dim']} else (),
    'kv_heads': kv_heads if {*kv_heads} != {fields['num_kv_heads']} else (),
    'layer_scalar': True,
  }
  return ModelConfig('gemma4_text', **fields)


def _check_implemented(hf: Mapping[str, Any]) -> None:
  """Raise UserError for a config.json of a model that is not dense."""
  found = [
    f'{what} ({key}={value})'
    for key, (what, default) in MISSING.items()
    if (value := read_size(hf, key, default, smallest=0))
  ]
  found += [f'{what} ({key}=True)' for key, what in MISSING_FLAGS.items() if read_flag(hf, key)]
  if found:
    raise UserError(
      f'config.json: cai_jax has no code for {", ".join(found)} of Gemma 4. Use a dense model '
      'without them, such as google/gemma-4-31B-it.'
    )


def _read_full_heads(
  hf: Mapping[str, Any], kinds: list[str], head_dim: int, kv_heads: int, from_keys: bool
) -> tuple[int, int]:
  """Return size and number of the key and value heads of layers with full attention.

  Args:
    hf: a parsed config.json.
    kinds: type of each layer.
    head_dim, kv_heads: those of the other layers.
    from_keys: whether values are the projected keys, without which the number is the same.

  Raises:
    UserError: if entries contradict each other, or are not the same for all such layers.
  """
  stated = {
    'head_dim': read_size(hf, 'global_head_dim', DEFAULT_FULL_HEAD_DIM),
    'num_key_value_heads': read_size(hf, 'num_global_key_value_heads', kv_heads),
  }
  overrides = hf.get('per_layer_config')
  if overrides is None:
    return stated['head_dim'], stated['num_key_value_heads'] if from_keys else kv_heads
  full = [layer for layer, kind in enumerate(kinds) if kind == FULL]
  good = isinstance(overrides, Mapping) and all(
    str(key).isdecimal() and isinstance(value, Mapping) for key, value in overrides.items()
  )
  # Transformers writes the numbers of layers with leading zeros.
  by_layer = {int(key): value for key, value in overrides.items()} if good else {}
  own: Mapping[str, Any] = next(iter(by_layer.values()), {})
  if not good or (by_layer and by_layer != dict.fromkeys(full, own)):
    raise UserError(
      f'config.json: per_layer_config is {show(overrides, 200)}. It must be an object with the '
      f'same entries for each layer with {FULL}, and for no other: '
      f'{", ".join(map(str, full))}.'
    )
  if unknown := sorted(own.keys() - {*OVERRIDES}):
    raise UserError(
      f'config.json: per_layer_config has {show(unknown[0])}, which is not supported; '
      f'{" and ".join(OVERRIDES)} are.'
    )
  found = {
    'head_dim': read_size(own, 'head_dim', head_dim),
    'num_key_value_heads': read_size(own, 'num_key_value_heads', kv_heads),
  }
  for name, key in zip(OVERRIDES, HEADS, strict=False):
    if hf.get(key) is not None and found[name] != stated[name]:
      raise UserError(
        f'config.json: per_layer_config has {name}={found[name]}, but {key}={stated[name]}. '
        'Correct the one that does not belong to the weights.'
      )
  if found['num_key_value_heads'] != kv_heads and not from_keys:
    raise UserError(
      f'config.json: per_layer_config has num_key_value_heads={found["num_key_value_heads"]}, not '
      f'{kv_heads}. This is supported only with attention_k_eq_v=true. Correct one of them.'
    )
  return found['head_dim'], found['num_key_value_heads']


def write_config(config: ModelConfig) -> dict[str, Any]:
  """Return the entries of a Gemma 4 config.json."""
  hf = gemma2.write_fields(config)
  ropes = write_layer_ropes(config, hf['layer_types'], gemma3_text.ROPES)
  without = (*ROPE_ENTRIES, 'query_pre_attn_scalar', 'attn_logit_softcapping')
  hf = {key: value for key, value in hf.items() if key not in without}
  last, from_keys = config.kinds[-1], any(config.values_from_keys)
  return hf | {
    'rope_parameters': ropes['rope_parameters'],
    'attention_k_eq_v': from_keys,
    'global_head_dim': last.head_dim,
    'num_global_key_value_heads': last.kv_heads if from_keys else None,
    'hidden_size_per_layer_input': 0,
    'num_kv_shared_layers': 0,
  }


FAMILIES.register('gemma4_text')(
  Family(
    read_config=read_config,
    write_config=write_config,
    weights=(
      *gemma2.WEIGHTS,
      *shared.QK_NORMS,
      *shared.per_layer(Weight('scalar', 'layer_scalar', '->1')),
    ),
    causal_lm='Gemma4ForCausalLM',
    classifier=None,
    title='Gemma 4 (dense), and the text half of the multimodal models',
    examples=('google/gemma-4-31B-it',),
    options=(
      'use_bidirectional_attention',
      'final_logit_softcapping',
      'attention_k_eq_v',
      *MISSING,
      *MISSING_FLAGS,
      *HEADS,
    ),
    multimodal={'gemma4': 'Gemma4ForConditionalGeneration'},
    prefixes=text_half.PREFIXES,
    ignored=text_half.IGNORED,
    sizes={
      'K': 'num_key_value_heads or num_global_key_value_heads',
      'H': 'head_dim or global_head_dim',
    },
  )
)
