"""The text half of multimodal models: its entries in config.json, and its weights."""

from collections.abc import Mapping
from typing import Any

from cai_jax.runtime.errors import UserError, show

# What transformers stores beside text_config and the text half needs.
_TOKENS = ('bos_token_id', 'eos_token_id', 'pad_token_id')

# Weights of the text half in the files of transformers 5 and 4, and the names of a text model.
PREFIXES = (
  ('model.language_model.', 'model.'),
  ('language_model.model.', 'model.'),
  ('language_model.lm_head.', 'lm_head.'),
)
# Weights of the other halves.
IGNORED = tuple(
  prefix + name
  for prefix in ('model.', '')
  for name in (
    'vision_tower.*',
    'vision_model.*',
    'visual.*',
    'multi_modal_projector.*',
    'audio_tower.*',
    'embed_vision.*',
    'embed_audio.*',
  )
)


def text_entries(hf: dict[str, Any]) -> dict[str, Any]:
  """Return the entries of a config.json that describe its language model.

  Args:
    hf: a parsed config.json of any model.

  Returns:
    `hf` itself if it has no text_config.

  Raises:
    UserError: if text_config is not an object, or contradicts the entries beside it.
  """
  text = hf.get('text_config')
  if text is None:
    return hf
  if not isinstance(text, Mapping):
    raise UserError(f'config.json: text_config is {show(text)}; it must be an object.')
  entries = {**text, **{key: hf[key] for key in _TOKENS if hf.get(key) is not None}}
  tied = [part.get('tie_word_embeddings') for part in (hf, text)]
  stated = [value for value in tied if value is not None]
  if len(stated) == 2 and tied[0] is not tied[1]:
    raise UserError(
      f'config.json: tie_word_embeddings={show(tied[0])} contradicts text_config.'
      f'tie_word_embeddings={show(tied[1])}. Remove the one that does not belong to the weights.'
    )
  return entries | ({'tie_word_embeddings': stated[0]} if stated else {})
