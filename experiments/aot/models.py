"""Dimensions of the models that configs name, without their weights."""

import dataclasses
import pathlib

from cai_jax.model.config import ModelConfig
from cai_jax.model.families.family import config_from_hf
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import read_json

LLAMA_3 = {
  'model_type': 'llama',
  'vocab_size': 128256,
  'num_key_value_heads': 8,
  'max_position_embeddings': 8192,
  'rope_theta': 500000.0,
  'rms_norm_eps': 1e-5,
}

# The fields of each config.json that determine the dimensions, so that no network is needed.
MODELS = {
  'meta-llama/Meta-Llama-3-8B-Instruct': LLAMA_3
  | {
    'hidden_size': 4096,
    'intermediate_size': 14336,
    'num_hidden_layers': 32,
    'num_attention_heads': 32,
  },
  'alignment-handbook/zephyr-7b-sft-full': {  # Mistral 7B v0.1
    'model_type': 'mistral',
    'vocab_size': 32000,
    'hidden_size': 4096,
    'intermediate_size': 14336,
    'num_hidden_layers': 32,
    'num_attention_heads': 32,
    'num_key_value_heads': 8,
    'max_position_embeddings': 32768,
    'sliding_window': 4096,
    'rope_theta': 10000.0,
    'rms_norm_eps': 1e-5,
  },
  'meta-llama/Llama-3.1-8B-Instruct': LLAMA_3
  | {
    'hidden_size': 4096,
    'intermediate_size': 14336,
    'num_hidden_layers': 32,
    'num_attention_heads': 32,
    'max_position_embeddings': 131072,
    'rope_scaling': {
      'rope_type': 'llama3',
      'factor': 8.0,
      'low_freq_factor': 1.0,
      'high_freq_factor': 4.0,
      'original_max_position_embeddings': 8192,
    },
  },
  'meta-llama/Meta-Llama-3-70B-Instruct': LLAMA_3
  | {
    'hidden_size': 8192,
    'intermediate_size': 28672,
    'num_hidden_layers': 80,
    'num_attention_heads': 64,
  },
  'Qwen/Qwen3-0.6B': {
    'model_type': 'qwen3',
    'vocab_size': 151936,
    'hidden_size': 1024,
    'intermediate_size': 3072,
    'num_hidden_layers': 28,
    'num_attention_heads': 16,
    'num_key_value_heads': 8,
    'head_dim': 128,
    'max_position_embeddings': 40960,
    'rope_theta': 1000000.0,
    'rms_norm_eps': 1e-6,
    'tie_word_embeddings': True,
  },
  'Qwen/Qwen3-30B-A3B': {
    'model_type': 'qwen3_moe',
    'vocab_size': 151936,
    'hidden_size': 2048,
    'intermediate_size': 6144,
    'num_hidden_layers': 48,
    'num_attention_heads': 32,
    'num_key_value_heads': 4,
    'head_dim': 128,
    'max_position_embeddings': 40960,
    'rope_theta': 1000000.0,
    'rms_norm_eps': 1e-6,
    'tie_word_embeddings': False,
    'num_experts': 128,
    'num_experts_per_tok': 8,
    'moe_intermediate_size': 768,
    'norm_topk_prob': True,
    'decoder_sparse_step': 1,
    'mlp_only_layers': [],
  },
  'google/gemma-3-27b-it': {
    'model_type': 'gemma3',
    'text_config': {
      'model_type': 'gemma3_text',
      'vocab_size': 262208,
      'hidden_size': 5376,
      'intermediate_size': 21504,
      'num_hidden_layers': 62,
      'num_attention_heads': 32,
      'num_key_value_heads': 16,
      'head_dim': 128,
      'query_pre_attn_scalar': 168,
      'sliding_window': 1024,
      'max_position_embeddings': 131072,
      'rope_scaling': {'rope_type': 'linear', 'factor': 8.0},
    },
  },
}


def find_model(name: str, path: str | None = None) -> ModelConfig:
  """Return the dimensions of a model, without its weights.

  Args:
    name: the config's name for it: one of MODELS, or a folder.
    path: a config.json, a folder with one, or one of MODELS, to use instead of `name`.

  Raises:
    UserError: if neither names a model.
  """
  if (path or name) in MODELS:
    return config_from_hf(MODELS[path or name])
  file = pathlib.Path(path or name).expanduser()
  file = file / 'config.json' if file.is_dir() else file
  if not file.is_file():
    raise UserError(
      f'{str(file)!r} is not a config.json or a folder with one, and {name!r} is not one of '
      f'{", ".join(MODELS)}. Give the path of a config.json with --model_config.'
    )
  return config_from_hf(read_json(file))


def first_layers(model: ModelConfig, layers: int) -> ModelConfig:
  """Return the first layers of a model as a model."""
  fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
  parts = {name: value[:layers] for name, value in fields.items() if isinstance(value, tuple)}
  return dataclasses.replace(model, num_layers=layers, **parts)
