"""What fixes a model besides its parameters, read from and written to a Hugging Face config."""

import dataclasses
from typing import Any

import numpy as np

from cai_jax.runtime.errors import UserError

FAMILIES = ('llama', 'mistral', 'qwen2', 'qwen3')
REQUIRED = (  # of a config.json; the rest has a usual value
  'vocab_size',
  'hidden_size',
  'intermediate_size',
  'num_hidden_layers',
  'num_attention_heads',
  'max_position_embeddings',
)


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
  """Frequency scaling of Llama 3.1 and later (`rope_type: llama3` of Hugging Face configs)."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_positions: int  # tokens


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shape of a Llama-family decoder. Sizes are counts of channels, heads, layers or tokens."""

  family: str
  vocab_size: int
  d_model: int
  d_ff: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  max_positions: int
  rope_theta: float = 10_000.0
  rope_scaling: Llama3Rope | None = None
  norm_eps: float = 1e-5
  tied_embeddings: bool = False
  qkv_bias: bool = False  # biases on query, key and value (Qwen2)
  output_bias: bool = False  # bias on the attention's output projection (Llama's attention_bias)
  qk_norm: bool = False  # RMSNorm over each head's query and key (Qwen3)
  windows: tuple[int | None, ...] = ()  # attention window of each layer in tokens; () is all full

  def __post_init__(self):
    if self.family not in FAMILIES:
      raise UserError(f'model family {self.family!r} is not supported; one of {FAMILIES} is.')
    if self.num_heads % self.num_kv_heads:
      raise UserError(
        f'num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}.'
      )
    if self.windows and len(self.windows) != self.num_layers:
      raise UserError(f'windows has {len(self.windows)} entries for {self.num_layers} layers.')

  def window(self, layer: int) -> int | None:
    """Attention window of a layer in tokens, the token itself included; None is unlimited."""
    return self.windows[layer] if self.windows else None

  @property
  def num_params(self) -> int:
    """Number of parameters."""
    attention = self.d_model * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
    attention += self.qkv_bias * self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
    attention += self.output_bias * self.d_model + self.qk_norm * 2 * self.head_dim
    layer = attention + 3 * self.d_model * self.d_ff + 2 * self.d_model
    embeddings = self.vocab_size * self.d_model * (1 if self.tied_embeddings else 2)
    return embeddings + self.num_layers * layer + self.d_model

  def training_flops(self, lengths, adapters: bool = False) -> float:
    """FLOPs of products that a training step over sequences of so many tokens each needs.

    2 a parameter and token for the forward pass and twice that for the backward one, tables that
    are only looked up in left out; and of attention the half that causality leaves, within windows.
    Nothing that is computed again counts again.

    Args:
      lengths: i[n], tokens of each sequence.
      adapters: whether low-rank adapters alone are trained: no gradients of the parameters then.
    """
    lengths = np.asarray(lengths, np.float64)
    looked_up = 0 if self.tied_embeddings else self.vocab_size * self.d_model
    products = (4 if adapters else 6) * (self.num_params - looked_up) * lengths.sum()
    pairs = 0.0
    for layer in range(self.num_layers):
      window = np.minimum(lengths, self.window(layer) or np.inf)
      pairs += (window * lengths - window * (window - 1) / 2).sum()
    return products + 12 * self.num_heads * self.head_dim * pairs


def from_hf(hf: dict[str, Any]) -> ModelConfig:
  """ModelConfig of a parsed Hugging Face `config.json`.

  Raises:
    ValueError: for a family, activation, rotary type or option that is not implemented, naming it.
  """
  family = hf.get('model_type')
  if family not in FAMILIES:
    raise UserError(
      f'model_type {family!r} is not supported; cai_jax implements {", ".join(FAMILIES)} '
      '(Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen2.5, Qwen3).'
    )
  for key, allowed in (
    ('hidden_act', 'silu'),
    ('mlp_bias', False),
    ('quantization_config', None),
    ('partial_rotary_factor', 1.0),
  ):
    if hf.get(key, allowed) != allowed:
      raise UserError(f'config.json: {key}={hf[key]!r} is not supported; only {allowed!r} is.')
  for key in REQUIRED:
    if not isinstance(hf.get(key), int) or hf[key] < 1:
      raise UserError(f'config.json: {key} is {hf.get(key)!r}; it must be a positive integer.')
  num_heads = hf['num_attention_heads']
  default_head_dim = 128 if family == 'qwen3' else hf['hidden_size'] // num_heads
  theta, scaling = _rope(hf)
  attention_bias = bool(hf.get('attention_bias', False))
  return ModelConfig(
    family=family,
    vocab_size=hf['vocab_size'],
    d_model=hf['hidden_size'],
    d_ff=hf['intermediate_size'],
    num_layers=hf['num_hidden_layers'],
    num_heads=num_heads,
    num_kv_heads=hf.get('num_key_value_heads') or num_heads,
    head_dim=hf.get('head_dim') or default_head_dim,
    max_positions=hf['max_position_embeddings'],
    rope_theta=theta,
    rope_scaling=scaling,
    norm_eps=hf.get('rms_norm_eps', 1e-6),
    tied_embeddings=bool(hf.get('tie_word_embeddings', False)),
    qkv_bias=family == 'qwen2' or attention_bias,
    output_bias=family in ('llama', 'qwen3') and attention_bias,
    qk_norm=family == 'qwen3',
    windows=_windows(hf),
  )


def architecture(config: ModelConfig, task: str) -> str:
  """Transformers' class of a model for a task, such as 'LlamaForCausalLM' for 'CausalLM'."""
  return f'{config.family.capitalize()}For{task}'


def to_hf(config: ModelConfig) -> dict[str, Any]:
  """The Hugging Face `config.json` of a model, such that `from_hf(to_hf(c)) == c`.

  Raises:
    ValueError: for a model that no config of its family describes.
  """
  hf = {
    'architectures': [architecture(config, 'CausalLM')],
    'model_type': config.family,
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
    'rope_parameters': _rope_parameters(config),
  }
  if config.rope_scaling is not None:  # where transformers 4 looks for it
    hf['rope_scaling'] = {k: v for k, v in hf['rope_parameters'].items() if k != 'rope_theta'}
  if config.family in ('llama', 'qwen3'):
    hf['attention_bias'] = config.output_bias
  if config.family == 'mistral':
    hf['sliding_window'] = config.windows[0] if config.windows else None
  if config.family in ('qwen2', 'qwen3'):
    sliding = [w for w in config.windows if w is not None]
    hf['use_sliding_window'] = bool(sliding)
    hf['sliding_window'] = sliding[0] if sliding else None
    hf['layer_types'] = [
      'full_attention' if config.window(layer) is None else 'sliding_attention'
      for layer in range(config.num_layers)
    ]
  if (back := from_hf(hf)) != config:
    fields = [f.name for f in dataclasses.fields(config)]
    differ = [name for name in fields if getattr(back, name) != getattr(config, name)]
    raise UserError(
      f'{differ[0]}={getattr(config, differ[0])!r} cannot be written to the config.json of a '
      f'{config.family} model: it would be read as {getattr(back, differ[0])!r}.'
    )
  return hf


def _rope(hf: dict[str, Any]) -> tuple[float, Llama3Rope | None]:
  """Base and scaling of the rotary embedding, in the form of transformers 5 or of earlier ones."""
  rope = hf.get('rope_parameters') or hf.get('rope_scaling') or {}
  thetas = (rope.get('rope_theta'), hf.get('rope_theta'), 10_000.0)
  theta = float(next(theta for theta in thetas if theta is not None))
  if (rotary := rope.get('partial_rotary_factor', 1.0)) != 1.0:
    raise UserError(f'config.json: partial_rotary_factor={rotary!r} is not supported; only 1 is.')
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind == 'default':
    return theta, None
  if kind != 'llama3':
    raise UserError(f"rope_type {kind!r} is not supported; 'default' and 'llama3' are.")
  fields = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')
  if absent := [field for field in fields if rope.get(field) is None]:
    raise UserError(
      f"config.json: rope_type 'llama3' needs {', '.join(fields)}; {', '.join(absent)} is missing."
    )
  return theta, Llama3Rope(
    factor=float(rope['factor']),
    low_freq_factor=float(rope['low_freq_factor']),
    high_freq_factor=float(rope['high_freq_factor']),
    original_max_positions=int(rope['original_max_position_embeddings']),
  )


def _rope_parameters(config: ModelConfig) -> dict[str, Any]:
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


def _windows(hf: dict[str, Any]) -> tuple[int | None, ...]:
  """Attention window of each layer, () where every layer attends to everything before it."""
  # Transformers takes a Mistral config without the key to mean 4096; null is no window.
  window = hf.get('sliding_window', 4096 if hf['model_type'] == 'mistral' else None)
  layers = hf['num_hidden_layers']
  if window is None or hf['model_type'] == 'llama':
    return ()
  if hf['model_type'] == 'mistral':
    return (window,) * layers
  if not hf.get('use_sliding_window', False):
    return ()
  kinds = hf.get('layer_types')
  if kinds is None:  # Qwen2: the first max_window_layers layers attend to everything
    full = hf.get('max_window_layers', layers)
    kinds = ['full_attention' if i < full else 'sliding_attention' for i in range(layers)]
  windows = tuple(window if kind == 'sliding_attention' else None for kind in kinds)
  return windows if any(windows) else ()
