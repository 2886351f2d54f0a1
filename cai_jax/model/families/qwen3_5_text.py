"""Qwen3.5, dense: layers with a gated delta rule beside layers with gated attention.

The family also reads the text half of multimodal checkpoints.
"""

from typing import Any

from cai_jax.model.config import DeltaRule, ModelConfig
from cai_jax.model.families import shared, text_half
from cai_jax.model.families.family import FAMILIES, Family
from cai_jax.model.families.fields import read_flag, read_size, require
from cai_jax.model.families.rope import OBJECTS, RopeEntries
from cai_jax.model.families.weight_table import Weight
from cai_jax.runtime.errors import UserError, show

# Transformers' values of entries that config.json does not have.
DEFAULTS = {'head_dim': 256, 'num_key_value_heads': 4, 'max_position_embeddings': 32_768}
PERIOD = 4  # one layer of so many has attention, if config.json has no layer_types
ROPE = RopeEntries(fraction=0.25)
# Sections of rotated channels for the three positions of an image, which are equal in a text.
IMAGE_ENTRIES = ('mrope_section', 'mrope_interleaved')
KINDS = ('full_attention', 'linear_attention')
# The sizes of `DeltaRule`, their entries, and transformers' values if there are none.
SIZES = {
  'key_heads': ('linear_num_key_heads', 16),
  'value_heads': ('linear_num_value_heads', 32),
  'key_dim': ('linear_key_head_dim', 128),
  'value_dim': ('linear_value_head_dim', 128),
  'width': ('linear_conv_kernel_dim', 4),
}


def read_config(hf: dict[str, Any]) -> ModelConfig:
  """Return the ModelConfig of a Qwen3.5 config.json.

  Args:
    hf: a parsed config.json.

  Raises:
    UserError: if a size is missing, or an option has a value that is not implemented.
  """
  require(hf, 'attn_output_gate', True)
  stated = {key: value for key, value in hf.items() if value is not None}
  for key in OBJECTS:
    if isinstance(rope := stated.get(key), dict):
      stated[key] = {k: value for k, value in rope.items() if k not in IMAGE_ENTRIES}
  fields = shared.read_fields({**DEFAULTS, **stated}, rope=ROPE)
  bias = read_flag(hf, 'attention_bias')
  recurrent = _read_recurrent(hf, fields['num_layers'])
  delta = None
  if recurrent:
    sizes = {name: read_size(hf, *entry) for name, entry in SIZES.items()}
    delta = DeltaRule(recurrent, **sizes)
  return ModelConfig(
    'qwen3_5_text',
    **fields,
    qkv_bias=bias,
    output_bias=bias,
    qk_norm=True,
    norm_offset=1.0,
    attention_gate=True,
    delta=delta,
  )


def _read_recurrent(hf: dict[str, Any], layers: int) -> tuple[int, ...]:
  """Return the numbers of the layers with a gated delta rule."""
  every = read_size(hf, 'full_attention_interval', PERIOD)
  kinds = hf.get('layer_types') or [KINDS[(i + 1) % every > 0] for i in range(layers)]
  if not isinstance(kinds, list) or len(kinds) != layers or any(k not in KINDS for k in kinds):
    raise UserError(
      f'config.json: layer_types is {show(kinds)}; it must be a list with one of '
      f'{" and ".join(KINDS)} for each of num_hidden_layers={layers}.'
    )
  return tuple(i for i, kind in enumerate(kinds) if kind == KINDS[1])


def write_config(config: ModelConfig) -> dict[str, Any]:
  """Return the entries of a Qwen3.5 config.json."""
  hf = {
    **shared.write_fields(config, ROPE),
    'attention_bias': config.output_bias,
    'layer_types': [KINDS[config.recurrent(i)] for i in range(config.num_layers)],
  }
  if config.delta:
    hf |= {entry: getattr(config.delta, name) for name, (entry, _) in SIZES.items()}
  return hf


# J key heads of I channels, M value heads of U channels, W tokens of the convolution.
WEIGHTS = shared.per_layer(
  Weight('attention/query/kernel', 'self_attn.q_proj.weight', 'DNH->N+H,D'),
  Weight('attention/gate/kernel', 'self_attn.q_proj.weight', 'DNH->N+H,D'),
  *(
    Weight(path.removeprefix('layers/{}/'), name.removeprefix('model.layers.{}.'), axes)
    for path, name, axes in (*shared.ATTENTION[1:], *shared.QKV_BIASES[1:])
  ),
  Weight('attention/query/bias', 'self_attn.q_proj.bias', 'NH->N+H'),
  Weight('attention/gate/bias', 'self_attn.q_proj.bias', 'NH->N+H'),
  Weight('delta/query/kernel', 'linear_attn.in_proj_qkv.weight', 'DJI->+JI,D'),
  Weight('delta/key/kernel', 'linear_attn.in_proj_qkv.weight', 'DJI->+JI,D'),
  Weight('delta/value/kernel', 'linear_attn.in_proj_qkv.weight', 'DMU->+MU,D'),
  Weight('delta/query_conv/kernel', 'linear_attn.conv1d.weight', 'JIW->+JI,1,W'),
  Weight('delta/key_conv/kernel', 'linear_attn.conv1d.weight', 'JIW->+JI,1,W'),
  Weight('delta/value_conv/kernel', 'linear_attn.conv1d.weight', 'MUW->+MU,1,W'),
  Weight('delta/gate/kernel', 'linear_attn.in_proj_z.weight', 'DMU->MU,D'),
  Weight('delta/rate/kernel', 'linear_attn.in_proj_b.weight', 'DM->M,D'),
  Weight('delta/decay/kernel', 'linear_attn.in_proj_a.weight', 'DM->M,D'),
  Weight('delta/decay/bias', 'linear_attn.dt_bias', 'M->M'),
  Weight('delta/decay/scale', 'linear_attn.A_log', 'M->M'),
  Weight('delta/norm/scale', 'linear_attn.norm.weight', 'U->U'),
  Weight('delta/output/kernel', 'linear_attn.out_proj.weight', 'MUD->D,MU'),
)

FAMILIES.register('qwen3_5_text')(
  Family(
    read_config=read_config,
    write_config=write_config,
    weights=(
      *shared.EMBEDDINGS_AND_NORMS,
      *WEIGHTS,
      *shared.OUTPUT_BIAS,
      *shared.QK_NORMS,
      *shared.GATED_MLP,
    ),
    causal_lm='Qwen3_5ForCausalLM',
    classifier='Qwen3_5TextForSequenceClassification',
    title='Qwen3.5 (dense), the text half',
    examples=('Qwen/Qwen3.5-0.8B', 'Qwen/Qwen3.5-27B'),
    options=('attn_output_gate', *(entry for entry, _ in SIZES.values())),
    sizes={letter: SIZES[name][0] for letter, name in zip('JMIUW', SIZES, strict=True)},
    multimodal={'qwen3_5': 'Qwen3_5ForConditionalGeneration'},
    prefixes=text_half.PREFIXES,
    ignored=(*text_half.IGNORED, 'mtp.*'),
  )
)
