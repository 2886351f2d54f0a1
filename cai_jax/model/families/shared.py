"""Parts of configs and weight tables that several families share."""

from typing import Any

from cai_jax.model.config import ModelConfig
from cai_jax.model.families.fields import (
  MOST_LAYERS,
  read_flag,
  read_number,
  read_size,
  require,
)
from cai_jax.model.families.rope import LLAMA_ENTRIES, RopeEntries, read_rope, write_rope
from cai_jax.model.families.weight_table import Weight
from cai_jax.runtime.errors import UserError, show

# Weight tables. Those of a layer's weights leave out the layer, which `per_layer` adds.


def per_layer(*weights: Weight, prefix: str = 'model.layers.{}.') -> tuple[Weight, ...]:
  """Prefix our paths with 'layers/{}/' and Hugging Face's names with that of their layer.

  Args:
    weights: rows of a layer.
    prefix: Hugging Face's name of a layer, such as 'gpt_neox.layers.{}.'.
  """
  return tuple(Weight(f'layers/{{}}/{path}', prefix + name, axes) for path, name, axes in weights)


EMBEDDINGS = (  # with the last norm
  Weight('embed/table', 'model.embed_tokens.weight', 'VD->V,D'),
  Weight('head/table', 'lm_head.weight', 'VD->V,D'),
  Weight('norm/scale', 'model.norm.weight', 'D->D'),
)
EMBEDDINGS_AND_NORMS = (
  *EMBEDDINGS,
  *per_layer(
    Weight('attention_norm/scale', 'input_layernorm.weight', 'D->D'),
    Weight('mlp_norm/scale', 'post_attention_layernorm.weight', 'D->D'),
  ),
)
ATTENTION_OUTPUT = per_layer(
  Weight('attention/output/kernel', 'self_attn.o_proj.weight', 'NHD->D,NH')
)
ATTENTION = (
  *per_layer(
    Weight('attention/query/kernel', 'self_attn.q_proj.weight', 'DNH->NH,D'),
    Weight('attention/key/kernel', 'self_attn.k_proj.weight', 'DKH->KH,D'),
    Weight('attention/value/kernel', 'self_attn.v_proj.weight', 'DKH->KH,D'),
  ),
  *ATTENTION_OUTPUT,
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
# Q counts the channels of all query heads, and R those of all key heads.
QK_NORMS_OVER_HEADS = per_layer(
  Weight('attention/q_norm/scale', 'self_attn.q_norm.weight', 'Q->Q'),
  Weight('attention/k_norm/scale', 'self_attn.k_norm.weight', 'R->R'),
)
SIZES_OVER_HEADS = {
  'Q': 'num_attention_heads × head_dim',
  'R': 'num_key_value_heads × head_dim',
}
GATED_MLP = per_layer(
  Weight('mlp/gate/kernel', 'mlp.gate_proj.weight', 'DF->F,D'),
  Weight('mlp/up/kernel', 'mlp.up_proj.weight', 'DF->F,D'),
  Weight('mlp/down/kernel', 'mlp.down_proj.weight', 'FD->D,F'),
)
MLP_BIASES = per_layer(
  Weight('mlp/gate/bias', 'mlp.gate_proj.bias', 'F->F'),
  Weight('mlp/up/bias', 'mlp.up_proj.bias', 'F->F'),
  Weight('mlp/down/bias', 'mlp.down_proj.bias', 'D->D'),
)
# Gate and up are one tensor, one after the other.
JOINED_MLP = per_layer(
  Weight('mlp/gate/kernel', 'mlp.gate_up_proj.weight', 'DF->+F,D'),
  Weight('mlp/up/kernel', 'mlp.gate_up_proj.weight', 'DF->+F,D'),
  Weight('mlp/down/kernel', 'mlp.down_proj.weight', 'FD->D,F'),
)

# Reading config.json.

# Transformers' names of activations, the one to write first, and those of ModelConfig.
ACTIVATIONS = {
  'silu': 'silu',
  'swish': 'silu',
  'gelu': 'gelu',
  'gelu_new': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'gelu_fast': 'gelu_tanh',
  'quick_gelu': 'gelu_quick',
  'relu': 'relu',
}


def read_fields(
  hf: dict[str, Any],
  default_head_dim: int | None = None,
  default_kv_heads: int | None = None,
  rope: RopeEntries = LLAMA_ENTRIES,
  default_eps: float = 1e-6,
) -> dict[str, Any]:
  """Return the fields of ModelConfig that all Llama-style families store in the same way.

  Args:
    hf: a parsed config.json.
    default_head_dim: size of a head if config.json does not give it; None means hidden_size divided
      by the number of heads.
    default_kv_heads: number of key and value heads if config.json has no num_key_value_heads; None
      means the number of heads.
    rope: how the family states rotary positions.
    default_eps: what norms add if config.json has no rms_norm_eps.

  Raises:
    UserError: if a size is missing, or an option has a value that is not implemented.
  """
  require(hf, 'hidden_act', 'silu', 'swish')  # two names of the same function
  require(hf, 'mlp_bias', False)
  d_model, num_heads = read_size(hf, 'hidden_size'), read_size(hf, 'num_attention_heads')
  head_dim = read_size(hf, 'head_dim', default_head_dim or max(d_model // num_heads, 1))
  kv_heads = num_heads
  if default_kv_heads is not None and 'num_key_value_heads' not in hf:
    kv_heads = default_kv_heads
  fields = {
    'vocab_size': read_size(hf, 'vocab_size'),
    'd_model': d_model,
    'd_ff': read_size(hf, 'intermediate_size'),
    'num_layers': read_size(hf, 'num_hidden_layers', largest=MOST_LAYERS),
    'num_heads': num_heads,
    'num_kv_heads': read_size(hf, 'num_key_value_heads', kv_heads),
    'head_dim': head_dim,
    'max_positions': read_size(hf, 'max_position_embeddings'),
    'norm_eps': read_number(hf, 'rms_norm_eps', default_eps),
    'tied_embeddings': read_flag(hf, 'tie_word_embeddings'),
    **read_rope(hf, head_dim, rope),
  }
  _check_heads(hf, fields, default_head_dim)
  return fields


def read_activation(hf: dict[str, Any], key: str, default: str) -> str:
  """Return `activation` of ModelConfig.

  Args:
    hf: a parsed config.json.
    key: name of the entry.
    default: transformers' name of the activation if the entry is absent.

  Raises:
    UserError: if the activation is not implemented.
  """
  require(hf, key, *ACTIVATIONS)
  return ACTIVATIONS[hf.get(key) or default]


def _check_heads(hf: dict[str, Any], fields: dict[str, Any], default_head_dim: int | None) -> None:
  """Check that the numbers and the size of heads fit each other."""
  heads, kv_heads = fields['num_heads'], fields['num_kv_heads']
  if heads % kv_heads:
    raise UserError(
      f'config.json: num_attention_heads={heads} is not a multiple of '
      f'num_key_value_heads={kv_heads}. Correct the one that does not belong to the weights.'
    )
  if hf.get('head_dim') is None and default_head_dim is None and fields['d_model'] % heads:
    raise UserError(
      f'config.json: hidden_size={fields["d_model"]} is not a multiple of '
      f'num_attention_heads={heads}, and there is no head_dim. Give the size of a head.'
    )
  if fields['head_dim'] % 2:
    raise UserError(
      f'config.json: head_dim is {fields["head_dim"]}, but rotary embeddings need an even number. '
      'Correct head_dim, or hidden_size and num_attention_heads, whose quotient it is by default.'
    )


DEFAULT_WINDOW = 4096  # tokens; transformers' value if config.json has no sliding_window
DEFAULT_FULL_LAYERS = 28  # transformers' value if config.json has no max_window_layers
LAYER_TYPES = ('full_attention', 'sliding_attention')


def read_layer_windows(hf: dict[str, Any]) -> tuple[int | None, ...]:
  """Return `windows` of ModelConfig, for families with full and windowed layers.

  Args:
    hf: a parsed config.json.

  Raises:
    UserError: if an entry is wrong, or two entries contradict each other.
  """
  layers = read_size(hf, 'num_hidden_layers', largest=MOST_LAYERS)
  kinds = read_layer_types(hf, layers)
  if not read_flag(hf, 'use_sliding_window'):
    if kinds and 'sliding_attention' in kinds:
      raise UserError(
        f'config.json: layer_types has sliding_attention in layer {kinds.index(LAYER_TYPES[1])}, '
        f'but use_sliding_window is {show(hf.get("use_sliding_window"))}. Correct one of them.'
      )
    return ()
  if 'sliding_window' in hf and hf['sliding_window'] is None:
    raise UserError(
      'config.json: use_sliding_window is True, but sliding_window is None. Give the window in '
      'tokens, or set use_sliding_window to false.'
    )
  window = read_size(hf, 'sliding_window', DEFAULT_WINDOW)
  full = read_size(hf, 'max_window_layers', DEFAULT_FULL_LAYERS, smallest=0)
  by_number = [LAYER_TYPES[layer >= full] for layer in range(layers)]
  # Transformers 5 writes its default of max_window_layers beside any layer_types.
  if (
    kinds and hf.get('max_window_layers') not in (None, DEFAULT_FULL_LAYERS) and kinds != by_number
  ):
    layer = next(i for i in range(layers) if kinds[i] != by_number[i])
    raise UserError(
      f'config.json: layer_types has {kinds[layer]} in layer {layer}, but max_window_layers={full} '
      f'means {by_number[layer]}. Correct one of them.'
    )
  windows = tuple(window if kind == LAYER_TYPES[1] else None for kind in kinds or by_number)
  return windows if any(windows) else ()


def read_layer_types(hf: dict[str, Any], layers: int) -> list[str] | None:
  """Return the checked layer_types, or None if there are none.

  Args:
    hf: a parsed config.json.
    layers: number of layers.

  Raises:
    UserError: if layer_types is not a list of a known type for each layer.
  """
  kinds = hf.get('layer_types')
  if kinds is None:
    return None
  if not isinstance(kinds, list) or len(kinds) != layers:
    length = len(kinds) if isinstance(kinds, list) else show(kinds)
    raise UserError(
      f'config.json: layer_types has {length} entries for num_hidden_layers={layers}. It must be a '
      'list with one entry per layer.'
    )
  for layer, kind in enumerate(kinds):
    if kind not in LAYER_TYPES:
      raise UserError(
        f'config.json: layer_types has {show(kind)} in layer {layer}, which is not supported; '
        f'{" and ".join(LAYER_TYPES)} are.'
      )
  return kinds


def read_no_windows(hf: dict[str, Any]) -> None:
  """Check that config.json asks for no attention window, for families that have none.

  Args:
    hf: a parsed config.json.

  Raises:
    UserError: if it does.
  """
  kinds = read_layer_types(hf, read_size(hf, 'num_hidden_layers', largest=MOST_LAYERS))
  used = read_flag(hf, 'use_sliding_window', default=hf.get('sliding_window') is not None)
  if used or (kinds and 'sliding_attention' in kinds):
    raise UserError(
      f'config.json: model_type {show(hf.get("model_type"))} has no attention window, but '
      f'sliding_window={show(hf.get("sliding_window"))}, '
      f'use_sliding_window={show(hf.get("use_sliding_window"))} or layer_types asks for one. '
      'Correct model_type, or remove these entries.'
    )


# Writing config.json.


def write_activation(config: ModelConfig) -> str:
  """Return transformers' name of a model's activation."""
  return next(name for name, ours in ACTIVATIONS.items() if ours == config.activation)


def write_fields(config: ModelConfig, rope: RopeEntries = LLAMA_ENTRIES) -> dict[str, Any]:
  """Return the entries of config.json that `read_fields` reads."""
  return {
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
    **write_rope(config, rope),
  }


def write_layer_windows(config: ModelConfig) -> dict[str, Any]:
  """Return the entries of config.json that `read_layer_windows` reads."""
  windows = [window for window in config.windows if window is not None]
  kinds = write_layer_types(config)
  hf = {
    'use_sliding_window': bool(windows),
    'sliding_window': windows[0] if windows else None,
    'layer_types': kinds,
  }
  if windows and kinds == sorted(kinds):  # full attention in the first layers
    hf['max_window_layers'] = kinds.count('full_attention')
  return hf


def write_layer_types(config: ModelConfig) -> list[str]:
  """Return layer_types of config.json: whether each layer has a window."""
  return [LAYER_TYPES[config.window(layer) is not None] for layer in range(config.num_layers)]
