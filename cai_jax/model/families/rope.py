"""Rotary embeddings in config.json, which transformers 4 and 5 store in different entries."""

from collections.abc import Mapping
from typing import Any

from cai_jax.model.config import Llama3Rope, ModelConfig
from cai_jax.model.families.fields import read_number, read_size, require
from cai_jax.runtime.errors import UserError, show

THETA = 10_000.0  # transformers' base if config.json gives none
_COMMON = {'rope_type', 'type', 'rope_theta', 'partial_rotary_factor'}
_LLAMA3 = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')
_KEYS = {
  'default': _COMMON | {'factor', 'original_max_position_embeddings'},
  'llama3': _COMMON | set(_LLAMA3),
}


def read_rope(hf: Mapping[str, Any]) -> dict[str, Any]:
  """Return `rope_theta` and `rope_scaling` of ModelConfig.

  Transformers 5 stores both in `rope_parameters`. Earlier versions store `rope_theta` and
  `rope_scaling` separately. A file may contain all of them if they say the same.

  Args:
    hf: a parsed config.json.

  Raises:
    UserError: if two entries contradict each other, the type of scaling is not implemented, or a
      number is missing or wrong.
  """
  require(hf, 'partial_rotary_factor', 1.0)
  entries = [key for key in ('rope_parameters', 'rope_scaling') if hf.get(key)]
  # The types are compared first: one of them may not be implemented.
  kinds = [_read_type(hf, key) for key in entries]
  readings = [_read_scaling(hf, key) for key in entries] if len(set(kinds)) < 2 else kinds
  if len(set(readings)) > 1:
    raise UserError(
      f'config.json: rope_scaling={show(hf["rope_scaling"], 200)} contradicts '
      f'rope_parameters={show(hf["rope_parameters"], 200)}. Remove the one that the model '
      'was not trained with.'
    )
  return {
    'rope_theta': _read_theta(hf),
    'rope_scaling': next(iter(readings), None),
  }


def _read_theta(hf: Mapping[str, Any]) -> float:
  """Return the base of the rotary frequencies, which up to three entries state."""
  stated = {
    'rope_theta': hf.get('rope_theta'),
    **{
      f'{key}.rope_theta': hf[key].get('rope_theta')
      for key in ('rope_parameters', 'rope_scaling')
      if hf.get(key)
    },
  }
  thetas = {key: read_number(stated, key) for key, theta in stated.items() if theta is not None}
  if len(set(thetas.values())) > 1:
    both = ', '.join(f'{key}={theta}' for key, theta in thetas.items())
    raise UserError(
      f'config.json: {both} contradict each other. Remove the one that the model was not trained '
      'with.'
    )
  return next(iter(thetas.values()), THETA)


def _read_type(hf: Mapping[str, Any], key: str) -> str:
  """Return the type of scaling that one entry names, whether it is implemented or not."""
  rope = hf[key]
  if not isinstance(rope, dict):
    raise UserError(
      f'config.json: {key} is {show(rope)}; it must be an object such as '
      '{"rope_type": "default"}.'
    )
  kinds = {name: rope[name] for name in ('rope_type', 'type') if rope.get(name) is not None}
  if len(kinds) == 2 and kinds['rope_type'] != kinds['type']:
    raise UserError(
      f'config.json: {key} has rope_type={show(kinds["rope_type"])} and '
      f'type={show(kinds["type"])}, which contradict each other. Remove one of them.'
    )
  kind = next(iter(kinds.values()), 'default')
  if not isinstance(kind, str):
    raise UserError(f'config.json: {key} has rope_type {show(kind)}; it must be a name.')
  return kind


def _read_scaling(hf: Mapping[str, Any], key: str) -> Llama3Rope | None:
  """Return the scaling that one entry describes; None means that there is none."""
  rope, kind = hf[key], _read_type(hf, key)
  if kind not in _KEYS:
    raise UserError(
      f'config.json: {key} has rope_type {show(kind)}, which is not supported; '
      "'default' and 'llama3' are."
    )
  require(rope, 'partial_rotary_factor', 1.0)
  if unknown := sorted(k for k in rope.keys() - _KEYS[kind] if rope[k] is not None):
    raise UserError(
      f'config.json: {key}.{unknown[0]}={show(rope[unknown[0]])} is not supported for rope_type '
      f'{show(kind)}. Remove it if it has no effect.'
    )
  if kind == 'default':
    require(rope, 'factor', 1.0)
    return None
  return _read_llama3(hf, key)


def _read_llama3(hf: Mapping[str, Any], key: str) -> Llama3Rope:
  """Return the scaling of Llama 3.1 that one entry describes."""
  rope = hf[key]
  if missing := [name for name in _LLAMA3 if rope.get(name) is None]:
    raise UserError(
      f"config.json: rope_type 'llama3' needs {', '.join(_LLAMA3)}; {', '.join(missing)} is "
      f'missing in {key}.'
    )
  original = read_size(rope, 'original_max_position_embeddings')
  if hf.get('original_max_position_embeddings') not in (None, original):
    raise UserError(
      'config.json: original_max_position_embeddings='
      f'{show(hf["original_max_position_embeddings"])} contradicts {original} in {key}. Remove one.'
    )
  scaling = Llama3Rope(
    factor=read_number(rope, 'factor'),
    low_freq_factor=read_number(rope, 'low_freq_factor'),
    high_freq_factor=read_number(rope, 'high_freq_factor'),
    original_max_positions=original,
  )
  if scaling.low_freq_factor >= scaling.high_freq_factor or scaling.factor < 1:
    raise UserError(
      f'config.json: {key} has factor={scaling.factor}, low_freq_factor='
      f'{scaling.low_freq_factor} and high_freq_factor={scaling.high_freq_factor}. The factor must '
      'be at least 1, and low_freq_factor less than high_freq_factor.'
    )
  return scaling


def write_rope(config: ModelConfig) -> dict[str, Any]:
  """Return the entries of config.json that `read_rope` reads, for transformers 4 and 5."""
  scaling = config.rope_scaling
  if scaling is None:
    rope: dict[str, Any] = {'rope_type': 'default', 'rope_theta': config.rope_theta}
    return {'rope_theta': config.rope_theta, 'rope_parameters': rope}
  older = {
    'rope_type': 'llama3',
    'factor': scaling.factor,
    'low_freq_factor': scaling.low_freq_factor,
    'high_freq_factor': scaling.high_freq_factor,
    'original_max_position_embeddings': scaling.original_max_positions,
  }
  rope = {'rope_type': 'llama3', 'rope_theta': config.rope_theta, **older}
  return {'rope_theta': config.rope_theta, 'rope_parameters': rope, 'rope_scaling': older}
