"""GPT-2: learned positions, layer norms with biases, and kernels stored without transposition."""

from typing import Any

from cai_jax.model.config import ModelConfig
from cai_jax.model.families import shared
from cai_jax.model.families.family import FAMILIES, Family
from cai_jax.model.families.fields import MOST_LAYERS, read_flag, read_number, read_size, require
from cai_jax.model.families.weight_table import Weight
from cai_jax.runtime.errors import UserError


def read_config(hf: dict[str, Any]) -> ModelConfig:
  """Return the ModelConfig of a GPT-2 config.json.

  Args:
    hf: a parsed config.json.

  Raises:
    UserError: if a size is missing, or an option has a value that is not implemented.
  """
  require(hf, 'scale_attn_by_inverse_layer_idx', False)
  d_model, heads = read_size(hf, 'n_embd'), read_size(hf, 'n_head')
  if d_model % heads:
    raise UserError(
      f'config.json: n_embd={d_model} is not a multiple of n_head={heads}. Correct the one that '
      'does not belong to the weights.'
    )
  return ModelConfig(
    'gpt2',
    vocab_size=read_size(hf, 'vocab_size'),
    d_model=d_model,
    d_ff=read_size(hf, 'n_inner', 4 * d_model),
    num_layers=read_size(hf, 'n_layer', largest=MOST_LAYERS),
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=d_model // heads,
    max_positions=read_size(hf, 'n_positions'),
    norm_eps=read_number(hf, 'layer_norm_epsilon', 1e-5),
    tied_embeddings=read_flag(hf, 'tie_word_embeddings', default=True),
    qkv_bias=True,
    output_bias=True,
    learned_positions=True,
    norm='layer',
    activation=shared.read_activation(hf, 'activation_function', 'gelu_new'),
    gated=False,
    mlp_bias=True,
    query_scale=None if read_flag(hf, 'scale_attn_weights', default=True) else 1.0,
  )


def write_config(config: ModelConfig) -> dict[str, Any]:
  """Return the entries of a GPT-2 config.json."""
  return {
    'vocab_size': config.vocab_size,
    'n_embd': config.d_model,
    'n_inner': config.d_ff,
    'n_layer': config.num_layers,
    'n_head': config.num_heads,
    'n_positions': config.max_positions,
    'layer_norm_epsilon': config.norm_eps,
    'activation_function': shared.write_activation(config),
    'scale_attn_weights': config.query_scale is None,
    'tie_word_embeddings': config.tied_embeddings,
  }


FAMILIES.register('gpt2')(
  Family(
    read_config=read_config,
    write_config=write_config,
    weights=(
      Weight('embed/table', 'transformer.wte.weight', 'VD->V,D'),
      Weight('positions/table', 'transformer.wpe.weight', 'PD->P,D'),
      Weight('head/table', 'lm_head.weight', 'VD->V,D'),
      Weight('norm/scale', 'transformer.ln_f.weight', 'D->D'),
      Weight('norm/bias', 'transformer.ln_f.bias', 'D->D'),
      *shared.per_layer(
        Weight('attention_norm/scale', 'ln_1.weight', 'D->D'),
        Weight('attention_norm/bias', 'ln_1.bias', 'D->D'),
        Weight('mlp_norm/scale', 'ln_2.weight', 'D->D'),
        Weight('mlp_norm/bias', 'ln_2.bias', 'D->D'),
        Weight('attention/query/kernel', 'attn.c_attn.weight', 'DNH->D,+NH'),
        Weight('attention/key/kernel', 'attn.c_attn.weight', 'DKH->D,+KH'),
        Weight('attention/value/kernel', 'attn.c_attn.weight', 'DKH->D,+KH'),
        Weight('attention/query/bias', 'attn.c_attn.bias', 'NH->+NH'),
        Weight('attention/key/bias', 'attn.c_attn.bias', 'KH->+KH'),
        Weight('attention/value/bias', 'attn.c_attn.bias', 'KH->+KH'),
        Weight('attention/output/kernel', 'attn.c_proj.weight', 'NHD->NH,D'),
        Weight('attention/output/bias', 'attn.c_proj.bias', 'D->D'),
        Weight('mlp/up/kernel', 'mlp.c_fc.weight', 'DF->D,F'),
        Weight('mlp/up/bias', 'mlp.c_fc.bias', 'F->F'),
        Weight('mlp/down/kernel', 'mlp.c_proj.weight', 'FD->F,D'),
        Weight('mlp/down/bias', 'mlp.c_proj.bias', 'D->D'),
        prefix='transformer.h.{}.',
      ),
    ),
    causal_lm='GPT2LMHeadModel',
    classifier='GPT2ForSequenceClassification',
    title='GPT-2',
    examples=('openai-community/gpt2',),
    sizes={
      'D': 'n_embd',
      'F': 'n_inner',
      'N': 'n_head',
      'K': 'n_head',
      'H': '(n_embd ÷ n_head)',
      'P': 'n_positions',
    },
    # Old files have no prefix, and store the causal mask.
    prefixes=tuple((part, f'transformer.{part}') for part in ('h.', 'wte.', 'wpe.', 'ln_f.')),
    ignored=('transformer.h.*.attn.bias', 'transformer.h.*.attn.masked_bias'),
  )
)
