"""gpt-oss: attention with sinks, and experts with biases and a limit (Agarwal et al. 2025)."""

import dataclasses
from typing import Any

from cai_jax.model.config import ModelConfig
from cai_jax.model.families import experts, gemma2, shared
from cai_jax.model.families.family import FAMILIES, Family
from cai_jax.model.families.fields import read_flag, read_number, require
from cai_jax.model.families.quantized import MXFP4
from cai_jax.model.families.rope import OBJECTS, RopeEntries
from cai_jax.model.families.rope_scalings import ORIGINAL
from cai_jax.model.families.weight_table import Weight

# Transformers' values of entries that config.json does not have.
DEFAULT_EPS, DEFAULT_HEAD_DIM, DEFAULT_KV_HEADS, DEFAULT_WINDOW = 1e-5, 64, 8, 128
DEFAULT_LIMIT = 7.0
DEFAULT_SCALING = {'rope_type': 'yarn', 'factor': 32.0, ORIGINAL: 4096, 'truncate': False}
ROPE = RopeEntries(theta=150_000.0)


def read_config(hf: dict[str, Any]) -> ModelConfig:
  """Return the ModelConfig of a gpt-oss config.json.

  Args:
    hf: a parsed config.json.

  Raises:
    UserError: if a size is missing, or an option has a value that is not implemented.
  """
  require(hf, 'swiglu_alpha', 1.702)
  if not any(hf.get(key) for key in OBJECTS):
    hf = {**hf, 'rope_parameters': DEFAULT_SCALING}
  fields = shared.read_fields(
    hf,
    # A head_dim of null is hidden_size divided by the number of heads.
    default_head_dim=None if 'head_dim' in hf else DEFAULT_HEAD_DIM,
    default_kv_heads=DEFAULT_KV_HEADS,
    rope=ROPE,
    default_eps=DEFAULT_EPS,
  )
  mixture = experts.read_experts(hf, number=128, per_token=4, renormalize=True)
  bias = read_flag(hf, 'attention_bias', default=True)
  kinds = gemma2.read_kinds(hf, 2)
  return ModelConfig(
    'gpt_oss',
    **fields,
    qkv_bias=bias,
    output_bias=bias,
    windows=gemma2.read_windows({'sliding_window': DEFAULT_WINDOW} | hf, kinds),
    sinks=True,
    activation='gelu_quick',
    experts=dataclasses.replace(
      mixture,
      softmax_first=False,
      bias=True,
      limit=read_number(hf, 'swiglu_limit', DEFAULT_LIMIT),
      up_offset=1.0,
    ),
  )


def write_config(config: ModelConfig) -> dict[str, Any]:
  """Return the entries of a gpt-oss config.json."""
  mixture = experts.the_experts(config)
  return {
    **shared.write_fields(config, ROPE),
    'attention_bias': config.output_bias,
    **gemma2.write_windows(config),
    'num_local_experts': mixture.number,
    'num_experts_per_tok': mixture.per_token,
    'swiglu_limit': mixture.limit,
  }


FAMILIES.register('gpt_oss')(
  Family(
    read_config=read_config,
    write_config=write_config,
    weights=(
      *shared.EMBEDDINGS_AND_NORMS,
      *shared.ATTENTION,
      *shared.QKV_BIASES,
      *shared.OUTPUT_BIAS,
      *shared.per_layer(
        Weight('attention/sinks', 'self_attn.sinks', 'N->N'),
        Weight('mlp/router/kernel', 'mlp.router.weight', 'DE->E,D'),
        Weight('mlp/router/bias', 'mlp.router.bias', 'E->E'),
        # The channels of gate and up alternate.
        Weight('mlp/experts/gate/kernel', 'mlp.experts.gate_up_proj', 'EDF->E,D,F+'),
        Weight('mlp/experts/up/kernel', 'mlp.experts.gate_up_proj', 'EDF->E,D,F+'),
        Weight('mlp/experts/gate/bias', 'mlp.experts.gate_up_proj_bias', 'EF->E,F+'),
        Weight('mlp/experts/up/bias', 'mlp.experts.gate_up_proj_bias', 'EF->E,F+'),
        Weight('mlp/experts/down/kernel', 'mlp.experts.down_proj', 'EFD->E,F,D'),
        Weight('mlp/experts/down/bias', 'mlp.experts.down_proj_bias', 'ED->E,D'),
      ),
    ),
    causal_lm='GptOssForCausalLM',
    classifier='GptOssForSequenceClassification',
    title='gpt-oss',
    examples=('openai/gpt-oss-20b', 'unsloth/gpt-oss-20b-BF16'),
    options=(*experts.OPTIONS, 'swiglu_alpha', 'swiglu_limit'),
    sizes={'E': 'num_local_experts'},
    quantized=(MXFP4,),
  )
)
