"""GPT-NeoX and Pythia: layer norms with biases, and attention beside the feed-forward layer."""

from typing import Any

from cai_jax.model.config import ModelConfig
from cai_jax.model.families import shared
from cai_jax.model.families.family import FAMILIES, Family
from cai_jax.model.families.fields import read_flag, read_number
from cai_jax.model.families.rope import RopeEntries
from cai_jax.model.families.weight_table import Weight

OPTIONS = ('rotary_pct', 'rotary_emb_base', 'use_parallel_residual')
ROPE = RopeEntries(theta_key='rotary_emb_base', fraction=0.25, fraction_key='rotary_pct')
JOINED = 'attention.query_key_value'  # query, key and value side by side in each head


def read_config(hf: dict[str, Any]) -> ModelConfig:
  """Return the ModelConfig of a GPT-NeoX config.json.

  Args:
    hf: a parsed config.json.

  Raises:
    UserError: if a size is missing, or an option has a value that is not implemented.
  """
  shared.read_no_windows(hf)
  activation = shared.read_activation(hf, 'hidden_act', 'gelu')
  # All query heads have keys and values of their own, and there is no gate.
  others = {
    key: value for key, value in hf.items() if key not in ('num_key_value_heads', 'hidden_act')
  }
  bias = read_flag(hf, 'attention_bias', default=True)
  return ModelConfig(
    'gpt_neox',
    **shared.read_fields(others, rope=ROPE)
    | {
      'norm_eps': read_number(hf, 'layer_norm_eps', 1e-5),
      'qkv_bias': bias,
      'output_bias': bias,
      'norm': 'layer',
      'parallel_blocks': read_flag(hf, 'use_parallel_residual', default=True),
      'activation': activation,
      'gated': False,
      'mlp_bias': True,
    },
  )


def write_config(config: ModelConfig) -> dict[str, Any]:
  """Return the entries of a GPT-NeoX config.json."""
  hf = shared.write_fields(config, ROPE)
  for name in ('num_key_value_heads', 'head_dim', 'rms_norm_eps'):
    del hf[name]
  return hf | {
    'hidden_act': shared.write_activation(config),
    'layer_norm_eps': config.norm_eps,
    'attention_bias': config.output_bias,
    'use_parallel_residual': config.parallel_blocks,
  }


FAMILIES.register('gpt_neox')(
  Family(
    read_config=read_config,
    write_config=write_config,
    weights=(
      Weight('embed/table', 'gpt_neox.embed_in.weight', 'VD->V,D'),
      Weight('head/table', 'embed_out.weight', 'VD->V,D'),
      Weight('norm/scale', 'gpt_neox.final_layer_norm.weight', 'D->D'),
      Weight('norm/bias', 'gpt_neox.final_layer_norm.bias', 'D->D'),
      *shared.per_layer(
        Weight('attention_norm/scale', 'input_layernorm.weight', 'D->D'),
        Weight('attention_norm/bias', 'input_layernorm.bias', 'D->D'),
        Weight('mlp_norm/scale', 'post_attention_layernorm.weight', 'D->D'),
        Weight('mlp_norm/bias', 'post_attention_layernorm.bias', 'D->D'),
        Weight('attention/query/kernel', f'{JOINED}.weight', 'DNH->N+H,D'),
        Weight('attention/key/kernel', f'{JOINED}.weight', 'DKH->K+H,D'),
        Weight('attention/value/kernel', f'{JOINED}.weight', 'DKH->K+H,D'),
        Weight('attention/query/bias', f'{JOINED}.bias', 'NH->N+H'),
        Weight('attention/key/bias', f'{JOINED}.bias', 'KH->K+H'),
        Weight('attention/value/bias', f'{JOINED}.bias', 'KH->K+H'),
        Weight('attention/output/kernel', 'attention.dense.weight', 'NHD->D,NH'),
        Weight('attention/output/bias', 'attention.dense.bias', 'D->D'),
        Weight('mlp/up/kernel', 'mlp.dense_h_to_4h.weight', 'DF->F,D'),
        Weight('mlp/up/bias', 'mlp.dense_h_to_4h.bias', 'F->F'),
        Weight('mlp/down/kernel', 'mlp.dense_4h_to_h.weight', 'FD->D,F'),
        Weight('mlp/down/bias', 'mlp.dense_4h_to_h.bias', 'D->D'),
        prefix='gpt_neox.layers.{}.',
      ),
    ),
    causal_lm='GPTNeoXForCausalLM',
    classifier='GPTNeoXForSequenceClassification',
    title='Pythia and GPT-NeoX',
    examples=('EleutherAI/pythia-1.4b',),
    options=OPTIONS,
    sizes={'K': 'num_attention_heads', 'H': '(hidden_size ÷ num_attention_heads)'},
    # Old files store the causal mask.
    ignored=('gpt_neox.layers.*.attention.bias', 'gpt_neox.layers.*.attention.masked_bias'),
  )
)
