"""OLMoE: Llama with a mixture of experts in every layer, and norms over all heads."""

from typing import Any

from cai_jax.model.config import ModelConfig
from cai_jax.model.families import experts, shared
from cai_jax.model.families.family import FAMILIES, Family
from cai_jax.model.families.fields import read_flag

DEFAULT_EPS = 1e-5  # transformers' value if config.json has no rms_norm_eps


def read_config(hf: dict[str, Any]) -> ModelConfig:
  """Return the ModelConfig of an OLMoE config.json.

  Args:
    hf: a parsed config.json.

  Raises:
    UserError: if a size is missing, or an option has a value that is not implemented.
  """
  shared.read_no_windows(hf)
  bias = read_flag(hf, 'attention_bias')
  return ModelConfig(
    'olmoe',
    **shared.read_fields(hf, default_eps=DEFAULT_EPS),
    qkv_bias=bias,
    output_bias=bias,
    qk_norm=True,
    qk_norm_over_heads=True,
    experts=experts.read_experts(hf, number=64, per_token=8),
  )


def write_config(config: ModelConfig) -> dict[str, Any]:
  """Return the entries of an OLMoE config.json."""
  mixture = experts.the_experts(config)
  return {
    **shared.write_fields(config),
    'attention_bias': config.output_bias,
    'num_experts': mixture.number,
    'num_experts_per_tok': mixture.per_token,
    'norm_topk_prob': mixture.renormalize,
  }


FAMILIES.register('olmoe')(
  Family(
    read_config=read_config,
    write_config=write_config,
    weights=(
      *shared.EMBEDDINGS_AND_NORMS,
      *shared.ATTENTION,
      *shared.QKV_BIASES,
      *shared.OUTPUT_BIAS,
      *shared.QK_NORMS_OVER_HEADS,
      *experts.expert_weights(),
    ),
    fused=experts.FUSED,
    causal_lm='OlmoeForCausalLM',
    classifier=None,
    title='OLMoE',
    examples=('allenai/OLMoE-1B-7B-0924-Instruct',),
    options=experts.OPTIONS,
    sizes={'M': 'intermediate_size', **shared.SIZES_OVER_HEADS},
  )
)
