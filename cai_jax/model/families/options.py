"""Options of config.json that change what a model computes, and that most families do not have."""

from collections.abc import Collection, Mapping
from typing import Any

from cai_jax.model.families.fields import require

# Each option, and the values with which it changes nothing. Absence never does. Transformers
# ignores some of them for families that do not have them, and other programs do not.
OPTIONS: dict[str, tuple[Any, ...]] = {
  'is_encoder_decoder': (False,),
  'add_cross_attention': (False,),
  'is_causal': (True,),
  'use_bidirectional_attention': (False,),
  'pruned_heads': ({},),
  'attn_logit_softcapping': (),
  'final_logit_softcapping': (),
  'query_pre_attn_scalar': (),
  'attention_multiplier': (),
  'embedding_multiplier': (1.0,),
  'residual_multiplier': (1.0,),
  'logits_scaling': (1.0,),
  'logit_scale': (1.0,),
  'attention_chunk_size': (),
  'no_rope_layers': ([],),
  'no_rope_layer_interval': (),
  'clip_qkv': (),
  'alibi': (False,),
  'use_alibi': (False,),
  'use_mrope': (False,),
  'rotary_pct': (1.0,),
  'rotary_dim': (),
  'rotary_emb_base': (),
  'rope_local_base_freq': (),
  'rope_interleaved': (False,),
  'parallel_attn': (False,),
  'use_parallel_residual': (False,),
  'qk_layernorm': (False,),
  'use_qk_norm': (False,),
  'num_experts': (0,),
  'num_local_experts': (0,),
  'n_routed_experts': (0,),
  'n_shared_experts': (0,),
  'shared_intermediate_size': (0,),
  'shared_expert_intermediate_size': (0,),
  'router_jitter_noise': (0.0,),
  'routed_scaling_factor': (1.0,),
  'scoring_func': ('softmax',),
  'first_k_dense_replace': (0,),
  'q_lora_rank': (),
  'kv_lora_rank': (),
  'num_kv_shared_layers': (0,),
  'attention_k_eq_v': (False,),
  'hidden_size_per_layer_input': (0,),
  'use_double_wide_mlp': (False,),
  'enable_moe_block': (False,),
  'global_head_dim': (),
  'num_global_key_value_heads': (),
  'per_layer_config': ({},),
  'swiglu_alpha': (),
  'swiglu_limit': (),
  'attn_output_gate': (False,),
  'linear_num_key_heads': (),
  'linear_num_value_heads': (),
  'linear_key_head_dim': (),
  'linear_value_head_dim': (),
  'linear_conv_kernel_dim': (),
}


def check_options(hf: Mapping[str, Any], read: Collection[str] = ()) -> None:
  """Check that the options which a family does not read change nothing.

  Args:
    hf: a parsed config.json.
    read: the options that the family reads.

  Raises:
    UserError: if another option has none of its neutral values.
  """
  for option, neutral in OPTIONS.items():
    if option not in read:
      require(hf, option, *neutral)


def check_outer_options(hf: Mapping[str, Any], text: Mapping[str, Any]) -> None:
  """Check that a multimodal config.json has no options beside its text_config, which alone is read.

  Args:
    hf: a parsed config.json.
    text: the entries of its text half, which it may repeat.

  Raises:
    UserError: if an option outside of text_config has another value.
  """
  for option, neutral in OPTIONS.items():
    same = [text[option]] if text.get(option) is not None else []
    require(hf, option, *neutral, *same)
