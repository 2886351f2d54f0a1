"""A tiny random model of each family, written by torch. A new family is one line of FAMILIES."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import pytest

VOCAB_SIZE = 384  # rows of the tiny models' embeddings, a few more than the tokenizer uses

SHAPE = dict(
  vocab_size=VOCAB_SIZE,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=256,
)
LLAMA3_ROPE = dict(
  rope_type='llama3',
  rope_theta=500.0,
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=32,
)
YARN_ROPE = dict(
  rope_type='yarn',
  rope_theta=500.0,
  factor=4.0,
  original_max_position_embeddings=32,
  beta_fast=4.0,
  beta_slow=1.0,
)
# Name → model_type and what its config sets besides SHAPE. Windows are shorter than tests' rows.
# The place of a line decides its random weights, so add new lines at the end.
FAMILIES = {
  'llama2': ('llama', dict(num_key_value_heads=4, rms_norm_eps=1e-5)),
  'llama3': ('llama', dict(rope_parameters=LLAMA3_ROPE, rms_norm_eps=1e-5)),
  'llama_bias': ('llama', dict(attention_bias=True, head_dim=16)),
  'mistral': ('mistral', dict(sliding_window=5)),
  'qwen2': ('qwen2', dict(rope_parameters=dict(rope_type='default', rope_theta=1e6))),
  'qwen2_windows': (
    'qwen2',
    dict(use_sliding_window=True, sliding_window=4, max_window_layers=1, tie_word_embeddings=True),
  ),
  'qwen3': ('qwen3', dict(head_dim=16, tie_word_embeddings=True)),
  'smollm2': (
    'llama',
    dict(num_key_value_heads=1, num_attention_heads=2, tie_word_embeddings=True),
  ),
  'gemma2': (
    'gemma2',
    dict(
      head_dim=16,
      layer_types=['sliding_attention', 'full_attention', 'sliding_attention'],
      sliding_window=5,
      query_pre_attn_scalar=20,
      attn_logit_softcapping=5.0,
      final_logit_softcapping=12.0,
      tie_word_embeddings=False,
    ),
  ),
  'gemma3': (
    'gemma3_text',
    dict(
      head_dim=16,
      layer_types=['sliding_attention', 'full_attention', 'sliding_attention'],
      sliding_window=5,
      query_pre_attn_scalar=20,
      tie_word_embeddings=False,
      rope_parameters=dict(
        sliding_attention=dict(rope_type='default', rope_theta=100.0),
        full_attention=dict(rope_type='linear', factor=8.0, rope_theta=1e4),
      ),
    ),
  ),
  'gemma3_images': (
    'gemma3',
    dict(
      tie_word_embeddings=False,
      text_config=dict(
        head_dim=16,
        layer_types=['sliding_attention', 'full_attention', 'sliding_attention'],
        sliding_window=5,
        query_pre_attn_scalar=20,
        tie_word_embeddings=False,
      ),
      vision_config=dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
      ),
      mm_tokens_per_image=4,
      image_token_index=380,
      boi_token_index=381,
      eoi_token_index=382,
    ),
  ),
  'mixtral': ('mixtral', dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=5)),
  'qwen3_moe': (
    'qwen3_moe',
    dict(
      head_dim=16,
      num_experts=4,
      num_experts_per_tok=2,
      moe_intermediate_size=24,
      norm_topk_prob=True,
      mlp_only_layers=[1],
    ),
  ),
  'olmoe': ('olmoe', dict(num_experts=4, num_experts_per_tok=2, norm_topk_prob=False)),
  'olmo2': ('olmo2', dict(rope_parameters=dict(rope_type='default', rope_theta=500.0))),
  'ministral3': (
    'ministral3',
    dict(
      head_dim=16,
      sliding_window=None,
      rope_parameters=dict(
        rope_type='yarn',
        rope_theta=500.0,
        factor=4.0,
        original_max_position_embeddings=16,
        beta_fast=4.0,
        mscale=1.0,
        mscale_all_dim=1.0,
        llama_4_scaling_beta=0.3,
      ),
    ),
  ),
  'gemma4': (
    'gemma4_text',
    dict(
      head_dim=8,
      global_head_dim=16,
      num_key_value_heads=4,
      num_global_key_value_heads=2,
      attention_k_eq_v=True,
      hidden_size_per_layer_input=0,
      layer_types=['sliding_attention', 'sliding_attention', 'full_attention'],
      sliding_window=5,
      final_logit_softcapping=12.0,
      tie_word_embeddings=False,
    ),
  ),
  'gemma4_images': (
    'gemma4',
    dict(
      tie_word_embeddings=False,
      text_config=dict(
        head_dim=8,
        global_head_dim=16,
        num_key_value_heads=4,
        num_global_key_value_heads=2,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
        layer_types=['sliding_attention', 'sliding_attention', 'full_attention'],
        sliding_window=5,
        final_logit_softcapping=12.0,
        tie_word_embeddings=False,
      ),
      vision_config=dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        patch_size=4,
        pooling_kernel_size=1,
        position_embedding_size=16,
      ),
      # Torch replaces the tokens of images, so no text may have them.
      image_token_id=400,
      boi_token_id=401,
      eoi_token_id=402,
      video_token_id=403,
    ),
  ),
  'gpt_oss': (
    'gpt_oss',
    dict(
      head_dim=16,
      layer_types=['sliding_attention', 'full_attention', 'sliding_attention'],
      sliding_window=5,
      num_local_experts=4,
      num_experts_per_tok=2,
      swiglu_limit=1.5,
      rope_parameters=dict(
        rope_type='yarn',
        rope_theta=500.0,
        factor=4.0,
        original_max_position_embeddings=32,
        beta_fast=4.0,
        truncate=False,
      ),
    ),
  ),
  'olmo3': (
    'olmo3',
    dict(
      layer_types=['sliding_attention', 'full_attention', 'sliding_attention'],
      sliding_window=5,
      rope_parameters=dict(
        sliding_attention=dict(rope_type='default', rope_theta=500.0),
        full_attention=YARN_ROPE,
      ),
    ),
  ),
  'smollm3': (
    'smollm3',
    dict(no_rope_layers=[1, 0, 1], use_sliding_window=False),
  ),
  'smollm3_windows': (
    'smollm3',
    dict(
      no_rope_layers=[1, 0, 1],
      use_sliding_window=True,
      sliding_window=5,
      attention_bias=True,
      mlp_bias=True,
    ),
  ),
  'granite': (
    'granite',
    dict(
      embedding_multiplier=3.0,
      logits_scaling=0.5,
      residual_multiplier=0.4,
      attention_multiplier=0.2,
      attention_bias=True,
      mlp_bias=True,
    ),
  ),
  'granite4': (
    'granitemoehybrid',
    dict(
      layer_types=['full_attention'] * 3,
      num_local_experts=0,
      shared_intermediate_size=48,
      position_embedding_type='rope',
      embedding_multiplier=3.0,
      logits_scaling=0.5,
      residual_multiplier=0.4,
      attention_multiplier=0.2,
      tie_word_embeddings=True,
      mamba_n_heads=8,
    ),
  ),
  'granite4_nope': (
    'granitemoehybrid',
    dict(
      layer_types=['full_attention'] * 3,
      num_local_experts=0,
      shared_intermediate_size=48,
      position_embedding_type=None,
      embedding_multiplier=3.0,
      logits_scaling=0.5,
      residual_multiplier=0.4,
      attention_multiplier=0.2,
      mamba_n_heads=8,
    ),
  ),
  'phi3': ('phi3', dict(sliding_window=5)),
  'phi4': (
    'phi3',
    dict(
      max_position_embeddings=1024,
      original_max_position_embeddings=256,
      tie_word_embeddings=True,
      rope_parameters=dict(
        rope_type='longrope',
        rope_theta=1000.0,
        partial_rotary_factor=0.75,
        short_factor=[1.0, 1.1, 1.3],
        long_factor=[1.5, 2.5, 4.0],
        original_max_position_embeddings=256,
      ),
    ),
  ),
  'glm4': (
    'glm4',
    dict(
      head_dim=16,
      rope_parameters=dict(rope_type='default', rope_theta=500.0, partial_rotary_factor=0.5),
    ),
  ),
  'gpt_neox': (
    'gpt_neox',
    dict(
      hidden_size=64,
      num_attention_heads=8,
      rope_parameters=dict(rope_type='default', rope_theta=500.0, partial_rotary_factor=0.5),
    ),
  ),
  'gpt_neox_serial': (
    'gpt_neox',
    dict(hidden_size=128, use_parallel_residual=False, attention_bias=False),
  ),
  'gpt2': (
    'gpt2',
    dict(
      hidden_size=64,
      num_attention_heads=8,
      n_inner=48,
      resid_pdrop=0.0,
      embd_pdrop=0.0,
      attn_pdrop=0.0,
    ),
  ),
  'qwen3_5': (
    'qwen3_5_text',
    dict(
      head_dim=16,
      layer_types=['linear_attention', 'full_attention', 'linear_attention'],
      linear_num_key_heads=2,
      linear_num_value_heads=4,
      linear_key_head_dim=16,
      linear_value_head_dim=12,
      rms_norm_eps=0.03,  # random queries and keys can be orthogonal, and their tiny results noise
    ),
  ),
}

# Another line has the same family. Tests of these are slow tests.
REPEATED = (
  'llama2',
  'llama_bias',
  'smollm2',
  'qwen2',
  'gemma3_images',
  'gemma4_images',
  'smollm3_windows',
  'granite4_nope',
  'phi4',
  'gpt_neox_serial',
)


# Other lines have the same parts. Generating with these and training them are slow tests.
SIMILAR = (
  'gemma3',
  'ministral3',
  'olmo3',
  'phi3',
  'qwen3_moe',
  'smollm3',
  'mistral',
  'qwen2_windows',
  'qwen3',
  'gemma2',
  'mixtral',
  'olmoe',
  'olmo2',
  'granite',
  'granite4',
  'glm4',
  'gpt_neox',
)


def mark_slow(names: Sequence[str]) -> list[Any]:
  """Return the names of FAMILIES as parameters of a fixture, those in `names` marked slow."""
  return [
    pytest.param(name, marks=pytest.mark.slow) if name in names else name for name in FAMILIES
  ]


def make_config(name: str, **entries: Any) -> Any:
  """Return transformers' config of a line of FAMILIES.

  Args:
    name: key of FAMILIES.
    **entries: further entries of the config, such as token ids.
  """
  import transformers

  model_type, options = FAMILIES[name]
  if 'text_config' in options:  # a multimodal model, whose text half has the shape
    options = {**options, 'text_config': {**SHAPE, **options['text_config'], **entries}}
    return transformers.AutoConfig.for_model(model_type, **{**options, **entries})
  return transformers.AutoConfig.for_model(model_type, **{**SHAPE, **options, **entries})


def randomize(model: Any, seed: int) -> None:
  """Draw the weights of a torch model.

  They are so large that attention is far from uniform and a mistake changes the logits. Norms
  scale by other factors than 1, biases are not 0, and stored buffers are drawn too.

  Args:
    model: a transformers model, whose norms still have their initial scales.
    seed: of the draw.
  """
  import torch
  from transformers.pytorch_utils import Conv1D

  generator = torch.Generator().manual_seed(seed)
  transposed = {f'{name}.weight' for name, m in model.named_modules() if isinstance(m, Conv1D)}
  draw = lambda weight: torch.randn(weight.shape, generator=generator)  # noqa: E731
  stored = model.state_dict().keys()
  with torch.no_grad():
    for name, weight in model.named_parameters():
      noise = draw(weight)
      if name.endswith('bias'):
        weight.copy_(noise * 0.5)
      elif weight.ndim >= 2:
        inputs = weight.shape[0 if name in transposed else -1]
        weight.copy_(noise * 2 / inputs**0.5)
      else:
        weight.copy_(weight + 0.2 * noise)
    for name, buffer in model.named_buffers():
      if name in stored:
        buffer.copy_(buffer + 0.2 * draw(buffer))


def save_random(name: str, folder: str | os.PathLike, tokenizer: Any, special: list[int]) -> None:
  """Save the tiny random model of a line of FAMILIES as a Hugging Face folder.

  Args:
    name: key of FAMILIES.
    folder: is created.
    tokenizer: the model's tokenizer.
    special: ids of the end of a text, the start of a turn and the end of a turn.
  """
  import torch
  import transformers

  ids = dict(bos_token_id=None, eos_token_id=special[2], pad_token_id=special[0])
  seed = list(FAMILIES).index(name)
  with torch.random.fork_rng():  # vectors such as sinks keep a part of torch's own random start
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(make_config(name, **ids)).float()
  randomize(model, seed)
  model.generation_config = transformers.GenerationConfig(
    eos_token_id=[special[2], special[0]], pad_token_id=special[0]
  )
  model.save_pretrained(pathlib.Path(folder))
  tokenizer.save_pretrained(folder)


def load_in_torch(folder: str | os.PathLike) -> Any:
  """Load a model in torch, in f32 with eager attention.

  Torch then uses one thread, because handing such small products to several takes longer than
  computing them.
  """
  import torch
  import transformers
  from transformers.models.qwen3_5 import modeling_qwen3_5

  # Chunks of a gated delta rule lose digits after strong decays, and tokens one by one do not.
  one_by_one = modeling_qwen3_5.torch_recurrent_gated_delta_rule
  modeling_qwen3_5.torch_chunk_gated_delta_rule = one_by_one
  torch.set_num_threads(1)
  return transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation='eager'
  ).eval()
