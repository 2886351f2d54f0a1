"""SmolLM3: Llama's architecture without rotary positions in every fourth layer."""

from collections.abc import Sequence
from typing import Any

from cai_jax.model.config import ModelConfig, Rope
from cai_jax.model.families import shared
from cai_jax.model.families.family import FAMILIES, Family
from cai_jax.model.families.fields import read_flag, read_size
from cai_jax.model.families.rope import RopeEntries, read_no_rope_layers, write_no_rope_layers
from cai_jax.runtime.errors import UserError, show

# Transformers' values of entries that config.json does not have.
DEFAULT_KV_HEADS = 4
DEFAULT_INTERVAL = 4
ROPE = RopeEntries(theta=2e6)


def read_config(hf: dict[str, Any]) -> ModelConfig:
  """Return the ModelConfig of a SmolLM3 config.json.

  Args:
    hf: a parsed config.json.

  Raises:
    UserError: if a size is missing, or an option has a value that is not implemented.
  """
  entries = {'tie_word_embeddings': True, **hf, 'mlp_bias': False}
  fields = shared.read_fields(entries, default_kv_heads=DEFAULT_KV_HEADS, rope=ROPE)
  layers = fields['num_layers']
  rope = Rope(fields['rope_theta'], fields['rope_scaling'], fields['rope_channels'])
  ropes = read_no_rope_layers(hf, rope, layers, DEFAULT_INTERVAL)
  bias = read_flag(hf, 'attention_bias')
  return ModelConfig(
    'smollm3',
    **fields,
    qkv_bias=bias,
    output_bias=bias,
    mlp_bias=read_flag(hf, 'mlp_bias'),
    ropes=ropes,
    windows=read_windows(hf, ropes or (rope,) * layers),
  )


def read_windows(hf: dict[str, Any], ropes: Sequence[Rope | None]) -> tuple[int | None, ...]:
  """Return the window of each layer; () means full attention in all of them.

  Args:
    hf: a parsed config.json. Without layer_types, the layers without rotary positions have the
      window.
    ropes: the rotary positions of each layer.

  Raises:
    UserError: if an entry is wrong, or two entries contradict each other.
  """
  used = read_flag(hf, 'use_sliding_window') and hf.get('sliding_window') is not None
  full, windowed = shared.LAYER_TYPES
  by_rope = [windowed if used and rope is None else full for rope in ropes]
  kinds = shared.read_layer_types(hf, len(ropes)) or by_rope
  if windowed not in kinds:
    return ()
  if not used:
    raise UserError(
      f'config.json: layer_types has {windowed} in layer {kinds.index(windowed)}, but '
      f'use_sliding_window={show(hf.get("use_sliding_window"))} and '
      f'sliding_window={show(hf.get("sliding_window"))} give no window. Correct one of them.'
    )
  window = read_size(hf, 'sliding_window')
  return tuple(window if kind == windowed else None for kind in kinds)


def write_config(config: ModelConfig) -> dict[str, Any]:
  """Return the entries of a SmolLM3 config.json."""
  return {
    **shared.write_fields(config, ROPE),
    **shared.write_layer_windows(config),
    **write_no_rope_layers(config),
    'attention_bias': config.output_bias,
    'mlp_bias': config.mlp_bias,
  }


FAMILIES.register('smollm3')(
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
    causal_lm='SmolLM3ForCausalLM',
    classifier='SmolLM3ForSequenceClassification',
    title='SmolLM3',
    examples=('HuggingFaceTB/SmolLM3-3B',),
    options=('no_rope_layers', 'no_rope_layer_interval'),
  )
)
