"""Sampling settings that a model recommends, in place of 'model' in a config.

generation_config.json is read as servers such as vLLM read it:

- What it does not state has its neutral value, the default of `SamplingConfig`: temperature 1, and
  every filter and penalty off. In particular, an absent top_k is 0. `generate` of transformers 4
  would take 50.
- An absent do_sample counts as true. With `do_sample: false`, temperature, top_k, top_p and min_p
  are neutral, because Hugging Face ignores them then, too. repetition_penalty and the other fields
  are used in both cases.
- A served model has no such file here, so all its values are neutral.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from cai_jax.model.folder import find_folder
from cai_jax.model.generation_config import FILE, read_generation_config
from cai_jax.pipeline.schema import FROM_MODEL, expand_paths
from cai_jax.runtime.errors import UserError
from cai_jax.sampling.types import SamplingConfig
from cai_jax.tiny.files import model_path

# Hugging Face's names of the fields. Fields that are not listed have no counterpart in the file.
_NAMES = {
  'temperature': 'temperature',
  'top_k': 'top_k',
  'top_p': 'top_p',
  'min_p': 'min_p',
  'repetition_penalty': 'repetition_penalty',
  'max_tokens': 'max_new_tokens',
  'stop': 'stop_strings',
}
_ONLY_IF_SAMPLING = ('temperature', 'top_k', 'top_p', 'min_p')
_ROLES = {'initial': 'base', 'critique': 'critique', 'revision': 'revision'}


def resolve_sampling(config: ConfigDict) -> tuple[str, ...]:
  """Replace each 'model' in the sampling settings of a config by a value, in place.

  Args:
    config: a complete config.

  Returns:
    For each stage with such fields, a line that says what they are and where they come from.

  Raises:
    UserError: if the model's generation_config.json cannot be read, has a value that sampling here
      does not allow, or does not state max_new_tokens for max_tokens='model'.
  """
  notes = []
  for stage, role in _ROLES.items():
    section = config.sampling[stage]
    if fields := [name for name, value in section.items() if _is_from_model(value)]:
      source, entries = _read_entries(_model_of(config, role))
      stated = {}
      for field in fields:
        full_name = f'sampling.{stage}.{field}'
        section[field], stated[field] = _resolve(field, entries, full_name, source)
      notes.append(_describe(stage, section, stated, source))
  return tuple(notes)


def _is_from_model(value: Any) -> bool:
  return isinstance(value, str) and value == FROM_MODEL


def _model_of(config: ConfigDict, role: str) -> str:
  """Return the name of the local model that samples a stage; '' if it is served."""
  for candidate in (role, 'base'):  # M_critique and M_revise default to M_θ
    if config.remote[candidate].url:
      return ''
    if name := config.model[candidate]:
      return name
  return ''


def _read_entries(name: str) -> tuple[str, dict[str, Any]]:
  """Return where a model's recommendations are, for messages, and their content."""
  if not name:
    return f'a served model, whose {FILE} is not read', {}
  folder = find_folder(model_path(expand_paths(name, 'model')), (FILE,))
  return f'{FILE} of {name}', read_generation_config(folder, None)


def _resolve(field: str, entries: Mapping[str, Any], name: str, source: str) -> tuple[Any, bool]:
  """Return the value of a field, and whether the model states it.

  Args:
    field: a field of `SamplingConfig`.
    entries: content of generation_config.json.
    name: full name of the field, for messages.
    source: where the entries come from, for messages.
  """
  defaults = {field.name: field.default for field in dataclasses.fields(SamplingConfig)}
  stated = entries.get(_NAMES.get(field, ''))
  if stated is None or (field in _ONLY_IF_SAMPLING and entries.get('do_sample') is False):
    if field == 'max_tokens':  # no length of a reply is neutral
      raise UserError(
        f"{name}='model', but {source} does not state max_new_tokens. Give a number, such as "
        f'--config.{name}={defaults[field]}.'
      )
    return defaults[field], False
  if field == 'top_k':
    stated = max(stated, 0)  # -1 keeps all tokens, as 0
  if field == 'stop' and isinstance(stated, str):
    stated = (stated,)
  try:
    values: dict[str, Any] = {field: stated}
    return getattr(SamplingConfig(**values), field), True
  except UserError as error:
    message = str(error).removeprefix('sampling: ')
    raise UserError(f"{name}='model', but in {source}: {message}") from error


def _describe(
  stage: str, section: Mapping[str, Any], is_stated: Mapping[str, bool], source: str
) -> str:
  def show(fields: list[str]) -> str:
    return ', '.join(f'{field}={section[field]!r}' for field in fields)

  stated = [field for field in is_stated if is_stated[field]]
  neutral = [field for field in is_stated if not is_stated[field]]
  parts = [show(stated)] if stated else []
  parts += [f'neutral, because nothing else is stated: {show(neutral)}'] if neutral else []
  return f'sampling.{stage} from {source}: {"; ".join(parts)}'
