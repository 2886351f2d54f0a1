"""Ministral 3: Mistral with YaRN, whose queries grow with their position."""

from typing import Any

from cai_jax.model.config import ModelConfig, QueryGrowth
from cai_jax.model.families import mistral, shared, text_half
from cai_jax.model.families.family import FAMILIES, Family
from cai_jax.model.families.fields import read_number, read_size, require
from cai_jax.model.families.rope import OBJECTS
from cai_jax.model.families.rope_scalings import ORIGINAL, WHOLE

DEFAULT_EPS, DEFAULT_HEAD_DIM = 1e-5, 128  # transformers' values
RATE = 'llama_4_scaling_beta'
# Transformers' rotary positions of a config.json without any.
DEFAULT_ROPE = {
  'rope_type': 'yarn',
  'rope_theta': 1e6,
  'factor': 16.0,
  ORIGINAL: 16_384,
  'mscale': 1.0,
  'mscale_all_dim': 1.0,
  RATE: 0.1,
}


def read_config(hf: dict[str, Any]) -> ModelConfig:
  """Return the ModelConfig of a Ministral 3 config.json.

  Args:
    hf: a parsed config.json.

  Raises:
    UserError: if a size is missing, or an option has a value that is not implemented.
  """
  require(hf, 'attention_bias', False)
  if not any(hf.get(key) for key in OBJECTS):
    hf = {**hf, 'rope_parameters': DEFAULT_ROPE}
  fields = shared.read_fields(
    _without_growth(hf),
    # A head_dim of null is hidden_size divided by the number of heads.
    default_head_dim=None if 'head_dim' in hf else DEFAULT_HEAD_DIM,
    default_kv_heads=mistral.DEFAULT_KV_HEADS,
    default_eps=DEFAULT_EPS,
  )
  windows = mistral.read_windows({'sliding_window': None} | hf, fields['num_layers'])
  return ModelConfig('ministral3', **fields, windows=windows, query_growth=_read_growth(hf))


def _without_growth(hf: dict[str, Any]) -> dict[str, Any]:
  """Return the entries without those that `rope_parameters` has for this family alone."""
  objects = {key: hf[key] for key in OBJECTS if isinstance(hf.get(key), dict)}
  return hf | {
    key: {name: value for name, value in rope.items() if name not in (RATE, WHOLE)}
    for key, rope in objects.items()
  }


def _read_growth(hf: dict[str, Any]) -> QueryGrowth | None:
  """Return the growth of queries that `rope_parameters`, or `rope_scaling`, states."""
  key = next(key for key in OBJECTS if hf.get(key))
  if hf[key].get(RATE) in (None, 0):
    return None
  stated = {f'{key}.{name}': hf[key].get(name, hf.get(name)) for name in (RATE, ORIGINAL)}
  period = read_size(stated, f'{key}.{ORIGINAL}', hf[WHOLE])
  return QueryGrowth(read_number(stated, f'{key}.{RATE}'), period)


def write_config(config: ModelConfig) -> dict[str, Any]:
  """Return the entries of a Ministral 3 config.json."""
  hf = mistral.write_config(config)
  growth: dict[str, Any] = {RATE: 0.0}  # transformers needs the entry
  if config.query_growth is not None:
    growth = {RATE: config.query_growth.rate, ORIGINAL: config.query_growth.period}
  return hf | {key: hf[key] | growth for key in OBJECTS if key in hf}


FAMILIES.register('ministral3')(
  Family(
    read_config=read_config,
    write_config=write_config,
    weights=(*shared.EMBEDDINGS_AND_NORMS, *shared.ATTENTION, *shared.GATED_MLP),
    causal_lm='Ministral3ForCausalLM',
    classifier='Ministral3ForSequenceClassification',
    title='The text half of Ministral 3',
    examples=(
      'mistralai/Ministral-3-8B-Base-2512',
      'mistralai/Ministral-3-8B-Instruct-2512-BF16',
    ),
    multimodal={'mistral3': 'Mistral3ForConditionalGeneration'},
    named_halves=('mistral3',),
    prefixes=text_half.PREFIXES,
    ignored=text_half.IGNORED,
  )
)
