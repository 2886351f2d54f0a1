"""Qwen3-MoE: Qwen3 with a mixture of experts in all or some layers."""

from typing import Any

from cai_jax.model.config import ModelConfig
from cai_jax.model.families import experts, shared
from cai_jax.model.families.family import FAMILIES, Family
from cai_jax.model.families.fields import read_flag, read_size
from cai_jax.runtime.errors import UserError, show

DEFAULT_KV_HEADS = 4  # transformers' value if config.json has no num_key_value_heads


def read_config(hf: dict[str, Any]) -> ModelConfig:
  """Return the ModelConfig of a Qwen3-MoE config.json.

  Args:
    hf: a parsed config.json.

  Raises:
    UserError: if a size is missing, or an option has a value that is not implemented.
  """
  fields = shared.read_fields(hf, default_kv_heads=DEFAULT_KV_HEADS)
  bias = read_flag(hf, 'attention_bias')
  window = None
  if read_flag(hf, 'use_sliding_window') and ('sliding_window' not in hf or hf['sliding_window']):
    window = read_size(hf, 'sliding_window', shared.DEFAULT_WINDOW)
  return ModelConfig(
    'qwen3_moe',
    **fields,
    qkv_bias=bias,
    output_bias=bias,
    qk_norm=True,
    windows=() if window is None else (window,) * fields['num_layers'],
    experts=experts.read_experts(
      hf,
      number=128,
      per_token=8,
      size=('moe_intermediate_size', 768),
      dense_layers=_read_dense_layers(hf, fields['num_layers']),
    ),
  )


def _read_dense_layers(hf: dict[str, Any], layers: int) -> tuple[int, ...]:
  """Return the numbers of the layers without experts."""
  listed = hf.get('mlp_only_layers') or []
  if not isinstance(listed, list) or any(type(i) is not int or not 0 <= i < layers for i in listed):
    raise UserError(
      f'config.json: mlp_only_layers is {show(listed)}; it must be a list of numbers of layers, '
      f'each from 0 to {layers - 1}.'
    )
  step = read_size(hf, 'decoder_sparse_step', 1)
  return tuple(i for i in range(layers) if i in listed or (i + 1) % step)


def write_config(config: ModelConfig) -> dict[str, Any]:
  """Return the entries of a Qwen3-MoE config.json."""
  mixture = experts.the_experts(config)
  return {
    **shared.write_fields(config),
    'attention_bias': config.output_bias,
    'use_sliding_window': bool(config.windows),
    'sliding_window': config.windows[0] if config.windows else None,
    'num_experts': mixture.number,
    'num_experts_per_tok': mixture.per_token,
    'moe_intermediate_size': mixture.d_ff,
    'norm_topk_prob': mixture.renormalize,
    'decoder_sparse_step': 1,
    'mlp_only_layers': list(mixture.dense_layers),
  }


FAMILIES.register('qwen3_moe')(
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
      *experts.expert_weights(),
    ),
    fused=experts.FUSED,
    causal_lm='Qwen3MoeForCausalLM',
    classifier='Qwen3MoeForSequenceClassification',
    title='Qwen3-MoE',
    examples=('Qwen/Qwen3-30B-A3B',),
    options=experts.OPTIONS,
    sizes={'M': 'moe_intermediate_size'},
  )
)
