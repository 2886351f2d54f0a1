"""OLMo 3: OLMo 2 with windows in three layers of four, which are not scaled to longer contexts."""

from typing import Any

from cai_jax.model.config import ModelConfig
from cai_jax.model.families import gemma2, olmo2, shared
from cai_jax.model.families.family import FAMILIES, Family
from cai_jax.model.families.fields import read_flag
from cai_jax.model.families.rope import (
  ROPE_ENTRIES,
  RopeEntries,
  read_layer_ropes,
  write_layer_ropes,
)

DEFAULT_PERIOD = 4  # one layer of four has full attention
THETA = 500_000.0  # transformers' base if config.json gives none
ROPES = {
  'full_attention': RopeEntries(theta=THETA),
  'sliding_attention': RopeEntries(theta=THETA, objects=()),  # rope_scaling is not for them
}


def read_config(hf: dict[str, Any]) -> ModelConfig:
  """Return the ModelConfig of an OLMo 3 config.json.

  Args:
    hf: a parsed config.json.

  Raises:
    UserError: if a size is missing, or an option has a value that is not implemented.
  """
  kinds = gemma2.read_kinds(hf, DEFAULT_PERIOD)
  others = {key: value for key, value in hf.items() if key not in ROPE_ENTRIES}
  fields = shared.read_fields(others, default_eps=olmo2.DEFAULT_EPS)
  fields |= read_layer_ropes(hf, fields['head_dim'], kinds, ROPES)
  bias = read_flag(hf, 'attention_bias')
  return ModelConfig(
    'olmo3',
    **fields,
    qkv_bias=bias,
    output_bias=bias,
    windows=gemma2.read_windows(hf, kinds),
    pre_norm=False,
    post_norm=True,
    qk_norm=True,
    qk_norm_over_heads=True,
  )


def write_config(config: ModelConfig) -> dict[str, Any]:
  """Return the entries of an OLMo 3 config.json."""
  hf = {key: v for key, v in shared.write_fields(config).items() if key not in ROPE_ENTRIES}
  hf |= write_layer_ropes(config, shared.write_layer_types(config), ROPES)
  if len({rope['rope_theta'] for rope in hf['rope_parameters'].values()}) > 1:
    del hf['rope_theta']  # it holds for all layers
  return hf | {'attention_bias': config.output_bias, **gemma2.write_windows(config)}


FAMILIES.register('olmo3')(
  Family(
    read_config=read_config,
    write_config=write_config,
    weights=olmo2.WEIGHTS,
    causal_lm='Olmo3ForCausalLM',
    classifier='Olmo3ForSequenceClassification',
    title='OLMo 3',
    examples=('allenai/Olmo-3-7B-Instruct', 'allenai/Olmo-3-7B-Think'),
    sizes=shared.SIZES_OVER_HEADS,
  )
)
