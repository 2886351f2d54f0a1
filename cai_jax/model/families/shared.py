"""Parts of configs and weight tables that several families share."""

from typing import Any

from cai_jax.model.config import Llama3Rope, ModelConfig
from cai_jax.model.families.family import Weight
from cai_jax.runtime.errors import UserError

# Weight tables. Those of a layer's weights leave out the layer, which `per_layer` adds.


def per_layer(*weights: Weight) -> tuple[Weight, ...]:
  """Prefix our paths with 'layers/{}/' and Hugging Face's names with 'model.layers.{}.'."""
  return tuple(
    Weight(f'layers/{{}}/{path}', f'model.layers.{{}}.{name}', axes) for path, name, axes in weights
  )


EMBEDDINGS_AND_NORMS = (
  Weight('embed/table', 'model.embed_tokens.weight', 'VD->V,D'),
  Weight('head/table', 'lm_head.weight', 'VD->V,D'),
  Weight('norm/scale', 'model.norm.weight', 'D->D'),
  *per_layer(
    Weight('attention_norm/scale', 'input_layernorm.weight', 'D->D'),
    Weight('mlp_norm/scale', 'post_attention_layernorm.weight', 'D->D'),
  ),
)
ATTENTION = per_layer(
  Weight('attention/query/kernel', 'self_attn.q_proj.weight', 'DNH->NH,D'),
  Weight('attention/key/kernel', 'self_attn.k_proj.weight', 'DKH->KH,D'),
  Weight('attention/value/kernel', 'self_attn.v_proj.weight', 'DKH->KH,D'),
  Weight('attention/output/kernel', 'self_attn.o_proj.weight', 'NHD->D,NH'),
)
QKV_BIASES = per_layer(
  Weight('attention/query/bias', 'self_attn.q_proj.bias', 'NH->NH'),
  Weight('attention/key/bias', 'self_attn.k_proj.bias', 'KH->KH'),
  Weight('attention/value/bias', 'self_attn.v_proj.bias', 'KH->KH'),
)
OUTPUT_BIAS = per_layer(Weight('attention/output/bias', 'self_attn.o_proj.bias', 'D->D'))
QK_NORMS = per_layer(
  Weight('attention/q_norm/scale', 'self_attn.q_norm.weight', 'H->H'),
  Weight('attention/k_norm/scale', 'self_attn.k_norm.weight', 'H->H'),
)
GATED_MLP = per_layer(
  Weight('mlp/gate/kernel', 'mlp.gate_proj.weight', 'DF->F,D'),
  Weight('mlp/up/kernel', 'mlp.up_proj.weight', 'DF->F,D'),
  Weight('mlp/down/kernel', 'mlp.down_proj.weight', 'FD->D,F'),
)

# Reading config.json.

SIZES = (
  'vocab_size',
  'hidden_size',
  'intermediate_size',
  'num_hidden_layers',
  'num_attention_heads',
  'max_position_embeddings',
)


def read_fields(hf: dict[str, Any], default_head_dim: int | None = None) -> dict[str, Any]:
  """Return the fields of ModelConfig that all Llama-style families store in the same way.

  Args:
    hf: a parsed config.json.
    default_head_dim: size of a head if config.json does not give it; None means hidden_size divided
      by the number of heads.

  Raises:
    UserError: if a size is missing, or an option has a value that is not implemented.
  """
  require(hf, 'hidden_act', 'silu')
  require(hf, 'mlp_bias', False)
  for key in SIZES:
    if not isinstance(hf.get(key), int) or hf[key] < 1:
      raise UserError(f'config.json: {key} is {hf.get(key)!r}; it must be a positive integer.')
  num_heads = hf['num_attention_heads']
  return {
    'vocab_size': hf['vocab_size'],
    'd_model': hf['hidden_size'],
    'd_ff': hf['intermediate_size'],
    'num_layers': hf['num_hidden_layers'],
    'num_heads': num_heads,
    'num_kv_heads': hf.get('num_key_value_heads') or num_heads,
    'head_dim': hf.get('head_dim') or default_head_dim or hf['hidden_size'] // num_heads,
    'max_positions': hf['max_position_embeddings'],
    'norm_eps': hf.get('rms_norm_eps', 1e-6),
    'tied_embeddings': bool(hf.get('tie_word_embeddings', False)),
    **read_rope(hf),
  }


def require(hf: dict[str, Any], key: str, value: Any) -> None:
  """Check that an option in config.json is absent or has the only value that is implemented.

  Args:
    hf: a parsed config.json.
    key: name of the option.
    value: the implemented value.

  Raises:
    UserError: if the option has another value.
  """
  if hf.get(key, value) != value:
    raise UserError(f'config.json: {key}={hf[key]!r} is not supported; only {value!r} is.')


def read_rope(hf: dict[str, Any]) -> dict[str, Any]:
  """Return `rope_theta` and `rope_scaling` of ModelConfig.

  Transformers 5 stores both in `rope_parameters`. Earlier versions store `rope_theta` and
  `rope_scaling` separately.

  Args:
    hf: a parsed config.json.

  Raises:
    UserError: if the type of scaling is not implemented, or one of its numbers is missing.
  """
  rope = hf.get('rope_parameters') or hf.get('rope_scaling') or {}
  require(hf, 'partial_rotary_factor', 1.0)
  require(rope, 'partial_rotary_factor', 1.0)
  thetas = (rope.get('rope_theta'), hf.get('rope_theta'), 10_000.0)
  theta = float(next(theta for theta in thetas if theta is not None))
  rope_type = rope.get('rope_type', rope.get('type', 'default'))
  if rope_type == 'default':
    return {'rope_theta': theta, 'rope_scaling': None}
  if rope_type != 'llama3':
    raise UserError(
      f"config.json: rope_type {rope_type!r} is not supported; 'default' and 'llama3' are."
    )
  keys = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')
  if missing := [key for key in keys if rope.get(key) is None]:
    raise UserError(
      f"config.json: rope_type 'llama3' needs {', '.join(keys)}; {', '.join(missing)} is missing."
    )
  scaling = Llama3Rope(
    factor=float(rope['factor']),
    low_freq_factor=float(rope['low_freq_factor']),
    high_freq_factor=float(rope['high_freq_factor']),
    original_max_positions=int(rope['original_max_position_embeddings']),
  )
  return {'rope_theta': theta, 'rope_scaling': scaling}


def read_layer_windows(hf: dict[str, Any]) -> tuple[int | None, ...]:
  """Return `windows` of ModelConfig, for families with full and windowed layers.

  Args:
    hf: a parsed config.json.
  """
  window, layers = hf.get('sliding_window'), hf['num_hidden_layers']
  if window is None or not hf.get('use_sliding_window', False):
    return ()
  layer_types = hf.get('layer_types')
  if layer_types is None:  # before transformers 5, the first layers have full attention
    full = hf.get('max_window_layers', layers)
    layer_types = ['full_attention' if i < full else 'sliding_attention' for i in range(layers)]
  windows = tuple(window if kind == 'sliding_attention' else None for kind in layer_types)
  return windows if any(windows) else ()


# Writing config.json.


def write_fields(config: ModelConfig) -> dict[str, Any]:
  """Return the entries of config.json that `read_fields` reads."""
  rope = write_rope(config)
  hf = {
    'vocab_size': config.vocab_size,
    'hidden_size': config.d_model,
    'intermediate_size': config.d_ff,
    'num_hidden_layers': config.num_layers,
    'num_attention_heads': config.num_heads,
    'num_key_value_heads': config.num_kv_heads,
    'head_dim': config.head_dim,
    'max_position_embeddings': config.max_positions,
    'rms_norm_eps': config.norm_eps,
    'hidden_act': 'silu',
    'tie_word_embeddings': config.tied_embeddings,
    'rope_theta': config.rope_theta,
    'rope_parameters': rope,
  }
  if config.rope_scaling is not None:  # transformers 4 looks for it here
    hf['rope_scaling'] = {key: value for key, value in rope.items() if key != 'rope_theta'}
  return hf


def write_rope(config: ModelConfig) -> dict[str, Any]:
  """Return `rope_parameters` of config.json, as transformers 5 stores them."""
  scaling = config.rope_scaling
  if scaling is None:
    return {'rope_type': 'default', 'rope_theta': config.rope_theta}
  return {
    'rope_type': 'llama3',
    'rope_theta': config.rope_theta,
    'factor': scaling.factor,
    'low_freq_factor': scaling.low_freq_factor,
    'high_freq_factor': scaling.high_freq_factor,
    'original_max_position_embeddings': scaling.original_max_positions,
  }


def write_layer_windows(config: ModelConfig) -> dict[str, Any]:
  """Return the entries of config.json that `read_layer_windows` reads."""
  windows = [window for window in config.windows if window is not None]
  return {
    'use_sliding_window': bool(windows),
    'sliding_window': windows[0] if windows else None,
    'layer_types': [
      'full_attention' if config.window(layer) is None else 'sliding_attention'
      for layer in range(config.num_layers)
    ],
  }
