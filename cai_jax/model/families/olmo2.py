"""OLMo 2: norms after each layer instead of before it, and over all heads of queries and keys."""

from typing import Any

from cai_jax.model.config import ModelConfig
from cai_jax.model.families import shared
from cai_jax.model.families.family import FAMILIES, Family
from cai_jax.model.families.fields import read_flag
from cai_jax.model.families.weight_table import Weight

DEFAULT_EPS = 1e-5  # transformers' value if config.json has no rms_norm_eps

WEIGHTS = (
  *shared.EMBEDDINGS,
  *shared.per_layer(
    Weight('attention_post_norm/scale', 'post_attention_layernorm.weight', 'D->D'),
    Weight('mlp_post_norm/scale', 'post_feedforward_layernorm.weight', 'D->D'),
  ),
  *shared.ATTENTION,
  *shared.QKV_BIASES,
  *shared.OUTPUT_BIAS,
  *shared.QK_NORMS_OVER_HEADS,
  *shared.GATED_MLP,
)


def read_config(hf: dict[str, Any]) -> ModelConfig:
  """Return the ModelConfig of an OLMo 2 config.json.

  Args:
    hf: a parsed config.json.

  Raises:
    UserError: if a size is missing, or an option has a value that is not implemented.
  """
  shared.read_no_windows(hf)
  bias = read_flag(hf, 'attention_bias')
  return ModelConfig(
    'olmo2',
    **shared.read_fields(hf, default_eps=DEFAULT_EPS),
    qkv_bias=bias,
    output_bias=bias,
    pre_norm=False,
    post_norm=True,
    qk_norm=True,
    qk_norm_over_heads=True,
  )


def write_config(config: ModelConfig) -> dict[str, Any]:
  """Return the entries of an OLMo 2 config.json."""
  return {**shared.write_fields(config), 'attention_bias': config.output_bias}


FAMILIES.register('olmo2')(
  Family(
    read_config=read_config,
    write_config=write_config,
    weights=WEIGHTS,
    causal_lm='Olmo2ForCausalLM',
    classifier='Olmo2ForSequenceClassification',
    title='OLMo 2',
    examples=('allenai/OLMo-2-0425-1B-Instruct',),
    sizes=shared.SIZES_OVER_HEADS,
  )
)
