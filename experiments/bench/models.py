"""Write model folders with random weights that every system of the benchmark can load."""

import dataclasses
import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import safetensors.numpy

TINY = pathlib.Path(__file__).resolve().parents[2] / 'cai_jax' / 'tiny' / 'model'
TOKENIZER_FILES = ('tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja')
DTYPES = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class Shape:
  """Dimensions of a Llama-family model with tied embeddings."""

  layers: int
  d_model: int
  d_ff: int
  heads: int
  kv_heads: int
  head_dim: int
  vocab: int
  positions: int = 2048
  rope_theta: float = 100_000.0
  stored: str = 'float32'  # dtype of the weights in the file


SHAPES = {
  'M': Shape(30, 576, 1536, 9, 3, 64, 49_152),  # SmolLM2-135M
  'S': Shape(4, 256, 768, 4, 2, 64, 2_048),
  '1B': Shape(16, 2048, 8192, 32, 8, 64, 128_256, rope_theta=500_000.0, stored='bfloat16'),
}


def model_folder(name: str, workdir: pathlib.Path, seed: int = 0) -> pathlib.Path:
  """Return the folder of a model: the embedded one, or one written to `workdir` on first use.

  Args:
    name: 'tiny', or one of SHAPES.
    workdir: folder for models.
    seed: of the random weights.

  Raises:
    ValueError: if the name is unknown.
  """
  if name == 'tiny':
    return TINY
  if name not in SHAPES:
    raise ValueError(f'unknown model {name!r}; use one of {("tiny", *SHAPES)}.')
  target = workdir / f'model_{name}'
  if not (target / 'config.json').exists():
    write_model(target, SHAPES[name], seed)
  return target


def write_model(target: pathlib.Path, shape: Shape, seed: int = 0) -> None:
  """Write a model whose matrices have standard deviation 2/√fan_in and whose norms are 1.

  With smaller weights, a random model with tied embeddings only repeats its last token, and two
  systems would agree whatever they compute in between.
  """
  target.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(seed)
  dtype = DTYPES[shape.stored]

  def matrix(rows, columns):
    noise = rng.standard_normal((rows, columns), np.float32)
    return (noise * np.float32(2 / columns**0.5)).astype(dtype)

  ones = np.ones(shape.d_model, dtype)
  d, q, kv = shape.d_model, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
  tensors = {'model.embed_tokens.weight': matrix(shape.vocab, d), 'model.norm.weight': ones}
  for layer in range(shape.layers):
    at = f'model.layers.{layer}'
    tensors |= {
      f'{at}.input_layernorm.weight': ones,
      f'{at}.post_attention_layernorm.weight': ones,
      f'{at}.self_attn.q_proj.weight': matrix(q, d),
      f'{at}.self_attn.k_proj.weight': matrix(kv, d),
      f'{at}.self_attn.v_proj.weight': matrix(kv, d),
      f'{at}.self_attn.o_proj.weight': matrix(d, q),
      f'{at}.mlp.gate_proj.weight': matrix(shape.d_ff, d),
      f'{at}.mlp.up_proj.weight': matrix(shape.d_ff, d),
      f'{at}.mlp.down_proj.weight': matrix(d, shape.d_ff),
    }
  safetensors.numpy.save_file(tensors, target / 'model.safetensors', metadata={'format': 'pt'})
  for name in TOKENIZER_FILES:  # the benchmark uses token ids, so any local tokenizer will do
    shutil.copy(TINY / name, target / name)
  (target / 'generation_config.json').write_text(
    json.dumps({'bos_token_id': 1, 'eos_token_id': 4, 'pad_token_id': 0})
  )
  # Written last, because its presence marks the folder as complete.
  (target / 'config.json').write_text(json.dumps(hf_config(shape), indent=2))


def hf_config(shape: Shape) -> dict:
  """Return the content of the model's config.json."""
  return {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'vocab_size': shape.vocab,
    'hidden_size': shape.d_model,
    'intermediate_size': shape.d_ff,
    'num_hidden_layers': shape.layers,
    'num_attention_heads': shape.heads,
    'num_key_value_heads': shape.kv_heads,
    'head_dim': shape.head_dim,
    'max_position_embeddings': shape.positions,
    'rms_norm_eps': 1e-5,
    'hidden_act': 'silu',
    'tie_word_embeddings': True,
    'rope_theta': shape.rope_theta,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': shape.rope_theta},
    'attention_bias': False,
    'bos_token_id': 1,
    'eos_token_id': 4,
    'pad_token_id': 0,
    'dtype': shape.stored,
    'torch_dtype': shape.stored,
  }
