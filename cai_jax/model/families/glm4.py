"""GLM-4 (0414): norms before and after each layer, and rotation of neighboring channels."""

from typing import Any

from cai_jax.model.config import ModelConfig
from cai_jax.model.families import shared
from cai_jax.model.families.family import FAMILIES, Family
from cai_jax.model.families.fields import read_flag, require
from cai_jax.model.families.rope import RopeEntries
from cai_jax.model.families.weight_table import Weight

DEFAULT_EPS = 1.5625e-7  # transformers' value if config.json has no rms_norm_eps
DEFAULT_HEAD_DIM = 128
DEFAULT_KV_HEADS = 2
ROPE = RopeEntries(fraction=0.5)


def read_config(hf: dict[str, Any]) -> ModelConfig:
  """Return the ModelConfig of a GLM-4 config.json.

  Args:
    hf: a parsed config.json.

  Raises:
    UserError: if a size is missing, or an option has a value that is not implemented.
  """
  shared.read_no_windows(hf)
  require(hf, 'rope_interleaved', True)
  return ModelConfig(
    'glm4',
    **shared.read_fields(hf, DEFAULT_HEAD_DIM, DEFAULT_KV_HEADS, ROPE, DEFAULT_EPS),
    qkv_bias=read_flag(hf, 'attention_bias', default=True),
    post_norm=True,
    rope_interleaved=True,
  )


def write_config(config: ModelConfig) -> dict[str, Any]:
  """Return the entries of a GLM-4 config.json."""
  return {**shared.write_fields(config, ROPE), 'attention_bias': config.qkv_bias}


FAMILIES.register('glm4')(
  Family(
    read_config=read_config,
    write_config=write_config,
    weights=(
      *shared.EMBEDDINGS,
      *shared.per_layer(
        Weight('attention_norm/scale', 'input_layernorm.weight', 'D->D'),
        Weight('attention_post_norm/scale', 'post_self_attn_layernorm.weight', 'D->D'),
        Weight('mlp_norm/scale', 'post_attention_layernorm.weight', 'D->D'),
        Weight('mlp_post_norm/scale', 'post_mlp_layernorm.weight', 'D->D'),
      ),
      *shared.ATTENTION,
      *shared.QKV_BIASES,
      *shared.JOINED_MLP,
    ),
    causal_lm='Glm4ForCausalLM',
    classifier='Glm4ForSequenceClassification',
    title='GLM-4 of April 2025',
    examples=('zai-org/GLM-4-9B-0414',),
    options=('rope_interleaved',),
  )
)
