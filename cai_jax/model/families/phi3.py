"""Phi-3, Phi-3.5 and Phi-4: Llama's architecture with joined projections, and longrope."""

from typing import Any

from cai_jax.model.config import ModelConfig
from cai_jax.model.families import mistral, shared
from cai_jax.model.families.family import FAMILIES, Family
from cai_jax.model.families.fields import require
from cai_jax.model.families.rope import RopeEntries
from cai_jax.model.families.rope_scalings import ORIGINAL
from cai_jax.model.families.weight_table import Weight

# Transformers' values if config.json has no rms_norm_eps and no original context.
DEFAULT_EPS = 1e-5
DEFAULT_ORIGINAL = 4096  # tokens of the original context
# Old files call longrope 'su' or 'yarn'.
ROPE = RopeEntries(fraction=1.0, aliases={'su': 'longrope', 'yarn': 'longrope'})


def read_config(hf: dict[str, Any]) -> ModelConfig:
  """Return the ModelConfig of a Phi-3 config.json.

  Args:
    hf: a parsed config.json.

  Raises:
    UserError: if a size is missing, or an option has a value that is not implemented.
  """
  hf = {'sliding_window': None, **hf}
  for name in ('attention_bias', 'lm_head_bias'):
    require(hf, name, False)
  ropes = [hf[key] for key in ROPE.objects if isinstance(hf.get(key), dict)]
  if all(part.get(ORIGINAL) is None for part in (hf, *ropes)):
    hf[ORIGINAL] = DEFAULT_ORIGINAL
  fields = shared.read_fields(hf, rope=ROPE, default_eps=DEFAULT_EPS)
  return ModelConfig('phi3', **fields, windows=mistral.read_windows(hf, fields['num_layers']))


def write_config(config: ModelConfig) -> dict[str, Any]:
  """Return the entries of a Phi-3 config.json."""
  return {
    **shared.write_fields(config, ROPE),
    'sliding_window': config.windows[0] if config.windows else None,
  }


FAMILIES.register('phi3')(
  Family(
    read_config=read_config,
    write_config=write_config,
    weights=(
      *shared.EMBEDDINGS_AND_NORMS,
      *shared.per_layer(
        Weight('attention/query/kernel', 'self_attn.qkv_proj.weight', 'DNH->+NH,D'),
        Weight('attention/key/kernel', 'self_attn.qkv_proj.weight', 'DKH->+KH,D'),
        Weight('attention/value/kernel', 'self_attn.qkv_proj.weight', 'DKH->+KH,D'),
      ),
      *shared.ATTENTION_OUTPUT,
      *shared.JOINED_MLP,
    ),
    causal_lm='Phi3ForCausalLM',
    classifier='Phi3ForSequenceClassification',
    title='Phi-3, Phi-3.5 and Phi-4',
    examples=('microsoft/Phi-4-mini-instruct', 'microsoft/phi-4'),
  )
)
