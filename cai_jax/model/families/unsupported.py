"""What well-known model types need that is not implemented, for error messages."""

import difflib
from collections.abc import Iterable
from typing import Any, NamedTuple

from cai_jax.runtime.errors import show


class _Missing(NamedTuple):
  """Types that need the same thing.

  Attributes:
    what: what is missing.
    types: their model_types.
    nearest: types that do without it, the nearest first.
  """

  what: str
  types: str
  nearest: str


_MISSING = (
  _Missing(
    'state-space (Mamba) layers',
    'mamba mamba2 falcon_mamba jamba zamba zamba2 bamba nemotron_h falcon_h1 plamo2',
    'qwen3_5_text granitemoehybrid qwen3 llama',
  ),
  _Missing(
    'short convolutions and linear attention',
    'rwkv recurrent_gemma xlstm lfm2 lfm2_moe qwen3_next kimi_linear minimax olmo_hybrid',
    'qwen3_5_text qwen3 llama',
  ),
  _Missing(
    'multi-head latent attention',
    'deepseek_v2 deepseek_v3 deepseek_v32 minicpm3 kimi_k2 longcat_flash glm4_moe_lite youtu',
    'qwen3_moe olmoe llama',
  ),
  _Missing(
    'shared experts beside the routed ones',
    'qwen2_moe ernie4_5_moe glm4_moe dots1 hunyuan_v1_moe granitemoeshared',
    'qwen3_moe olmoe mixtral qwen3',
  ),
  _Missing('attention in chunks', 'llama4 llama4_text', 'llama mixtral'),
  _Missing('per-layer embeddings', 'gemma3n gemma3n_text', 'gemma3_text gemma2 llama'),
  _Missing(
    'an encoder with cross-attention',
    't5 mt5 umt5 t5gemma bart mbart pegasus marian longt5 switch_transformers whisper m2m_100',
    'gemma3_text llama qwen3',
  ),
  _Missing(
    'attention to later tokens, as in an encoder',
    'bert roberta xlm-roberta deberta deberta-v2 electra albert distilbert modernbert eurobert',
    'smollm3 qwen3 llama',
  ),
  _Missing('ALiBi positions', 'bloom mpt', 'gpt_neox gpt2 llama'),
)


def describe_unsupported(model_type: Any, supported: Iterable[str], text_type: Any = None) -> str:
  """Return the message for a config.json whose type no family reads.

  Args:
    model_type: its model_type.
    supported: the supported types.
    text_type: the model_type of its text_config, or None.
  """
  supported = sorted(supported)
  missing = next(
    (m for m in _MISSING for t in (text_type, model_type) if t in m.types.split()), None
  )
  near = find_nearest(text_type or model_type, supported)
  named = f'model_type {show(model_type)}'
  if text_type is not None:
    named += f' with the text_config of {show(text_type)}'
  first = f'config.json: {named} is not supported'
  first += f': cai_jax has no code for {missing.what}.' if missing else '.'
  nearest = f'; the nearest {"are" if len(near) > 1 else "is"} {", ".join(near)}' if near else ''
  second = f'The supported types are {", ".join(supported)}{nearest}.'
  if missing:
    return f'{first} {second} Use a checkpoint of one of them.'
  return (
    f'{first} {second} To add a family, register it in a file of your own and name that file in '
    'config.plugins.'
  )


def find_nearest(model_type: Any, supported: Iterable[str]) -> list[str]:
  """Return at most three supported types that are close to an unsupported one.

  Args:
    model_type: the unsupported type.
    supported: the supported types.
  """
  supported = list(supported)
  for missing in _MISSING:
    if model_type in missing.types.split():
      return [name for name in missing.nearest.split() if name in supported][:3]
  if not isinstance(model_type, str):
    return []
  return difflib.get_close_matches(model_type, supported, 3, 0.6)
