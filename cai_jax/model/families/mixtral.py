"""Mixtral: Mistral with a mixture of experts in every layer."""

from typing import Any

from cai_jax.model.config import ModelConfig
from cai_jax.model.families import experts, mistral, shared
from cai_jax.model.families.family import FAMILIES, Family
from cai_jax.model.families.fields import require
from cai_jax.model.families.rope import RopeEntries

# Transformers' values if config.json has no rms_norm_eps and no num_key_value_heads.
DEFAULT_EPS, DEFAULT_KV_HEADS = 1e-5, 8
ROPE = RopeEntries(theta=1e6)


def read_config(hf: dict[str, Any]) -> ModelConfig:
  """Return the ModelConfig of a Mixtral config.json.

  Args:
    hf: a parsed config.json.

  Raises:
    UserError: if a size is missing, or an option has a value that is not implemented.
  """
  require(hf, 'attention_bias', False)
  fields = shared.read_fields(
    hf, default_kv_heads=DEFAULT_KV_HEADS, rope=ROPE, default_eps=DEFAULT_EPS
  )
  windows = mistral.read_windows({'sliding_window': None} | hf, fields['num_layers'])
  mixture = experts.read_experts(hf, number=8, per_token=2, renormalize=True)
  return ModelConfig('mixtral', **fields, windows=windows, experts=mixture)


def write_config(config: ModelConfig) -> dict[str, Any]:
  """Return the entries of a Mixtral config.json."""
  mixture = experts.the_experts(config)
  return {
    **shared.write_fields(config, ROPE),
    'sliding_window': config.windows[0] if config.windows else None,
    'num_local_experts': mixture.number,
    'num_experts_per_tok': mixture.per_token,
  }


FAMILIES.register('mixtral')(
  Family(
    read_config=read_config,
    write_config=write_config,
    weights=(
      *shared.EMBEDDINGS_AND_NORMS,
      *shared.ATTENTION,
      *experts.expert_weights('block_sparse_moe', ('w1', 'w3', 'w2')),
    ),
    fused=experts.FUSED,
    causal_lm='MixtralForCausalLM',
    classifier='MixtralForSequenceClassification',
    title='Mixtral',
    examples=('mistralai/Mixtral-8x7B-Instruct-v0.1',),
    options=experts.OPTIONS,
    sizes={'M': 'intermediate_size', 'E': 'num_local_experts'},
  )
)
