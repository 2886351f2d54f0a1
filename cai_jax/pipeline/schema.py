"""Conversion between the `ConfigDict` of the command line and `RunConfig`.

Each default, unit and meaning is written once, where a component declares its settings.
`default_config` makes a `ConfigDict` from these declarations, and
`python -m cai_jax.pipeline.configuration` makes `docs/configuration.md`.
"""

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import RequiredValueError

from cai_jax.constitution import CONSTITUTIONS
from cai_jax.data.prompt_sources import SOURCES
from cai_jax.evaluation.config import TRAINED
from cai_jax.model.folder import MODEL_FILES
from cai_jax.pipeline.pair_sources import PAIR_SOURCES
from cai_jax.pipeline.preference_config import ROLES, PolicyConfig, RewardConfig
from cai_jax.pipeline.sections import RunConfig
from cai_jax.runtime.cloud.copies import local_copy
from cai_jax.runtime.cloud.store import is_url
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import expand_path
from cai_jax.runtime.manifest import VERSION, check_version
from cai_jax.runtime.settings import flatten
from cai_jax.runtime.terminal import say
from cai_jax.runtime.values import convert, describe_type
from cai_jax.sampling.remote import RemoteConfig
from cai_jax.sampling.types import SamplingConfig
from cai_jax.scoring.judge_server import JudgeServer
from cai_jax.scoring.refusal import CLASSIFIERS
from cai_jax.tiny.files import MODELS
from cai_jax.training.config import TrainConfig

# Fields of components that are not fields of the config: training uses the seed of the run, and
# `model.layers` for all models that it trains.
_HIDDEN = {
  (section, name)
  for section in (TrainConfig, RewardConfig, PolicyConfig)
  for name in ('seed', 'layers')
}
# Fields of earlier versions that have no effect any more, and why. Configs may still have them.
_REMOVED = {'engine.spans': 'a slot gets pages of the cache as its context grows'}
_SERVERS = (RemoteConfig, JudgeServer)  # sections that are None without a URL

# Value of a sampling field that stands for what the model's generation_config.json says. `build`
# replaces it before the settings become dataclasses; see cai_jax/pipeline/model_sampling.py.
FROM_MODEL = 'model'
_RECOMMENDED = ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty')
# All fields that decide how tokens are drawn, for a config file: `stage.update(AS_RECOMMENDED)`.
AS_RECOMMENDED = {
  field.name: FROM_MODEL
  for field in dataclasses.fields(SamplingConfig)
  if field.name in _RECOMMENDED
}


class Field(typing.NamedTuple):
  """One field of a config section.

  Attributes:
    name: name within the section.
    type: type hint.
    default: default value; None for a subsection.
    doc: meaning and unit.
    section: dataclass of the subsection, or None if the field is a value.
    keys: the meaning of each key, for a mapping whose keys are fields of their own.
    renamed: former name → name, for such keys.
    most: largest allowed value, or None.
    path: whether the value can be a path, or a tuple of paths.
    copied: whether a local copy is read if such a value is a URL.
    word: a text that the field may have instead of a value of its type, or None.
  """

  name: str
  type: Any
  default: Any
  doc: str
  section: type | None
  keys: Mapping[str, str]
  renamed: Mapping[str, str]
  most: float | None
  path: bool
  copied: bool
  word: str | None


_type_hints = functools.cache(typing.get_type_hints)  # which compiles each of its texts


def section_fields(section: type) -> Iterator[Field]:
  """Yield the fields of a section in the order of their declaration.

  Args:
    section: a dataclass, `RunConfig` or one of its sections.
  """
  hints = _type_hints(section)
  for field in dataclasses.fields(section):
    if (section, field.name) in _HIDDEN:
      continue
    hint, metadata = hints[field.name], field.metadata
    subsection = _section_of(hint)
    default = None if subsection else _default(field)
    yield Field(
      field.name,
      hint,
      default,
      metadata.get('doc', ''),
      subsection,
      metadata.get('keys', {}),
      metadata.get('renamed', {}),
      metadata.get('most'),
      metadata.get('path', False),
      metadata.get('copied', True),
      FROM_MODEL if section is SamplingConfig else metadata.get('word'),
    )


def _section_of(hint: Any) -> type | None:
  """Return the dataclass that a type hint names, alone or as an alternative to None."""
  options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
  return next((o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)), None)


def _default(field: dataclasses.Field) -> Any:
  if field.default is not dataclasses.MISSING:
    return field.default
  assert field.default_factory is not dataclasses.MISSING, f'{field.name} has no default'
  return field.default_factory()


def expand_paths(value: Any, field: str = '', copied: bool = True) -> Any:
  """Return a path, or a tuple of paths, in absolute form. Names of components stay as they are.

  Args:
    value: the path or paths.
    field: dotted name of the field, for messages.
    copied: whether a URL becomes the path of a local copy.

  Raises:
    UserError: if a URL cannot be copied; the message names the field.
  """
  if isinstance(value, tuple):
    return tuple(expand_paths(item, field, copied) for item in value)
  names = {*MODELS, *CONSTITUTIONS, *SOURCES, *CLASSIFIERS, *PAIR_SOURCES, *ROLES}
  names |= {TRAINED, 'auto', ''}
  if not isinstance(value, str) or value in names:
    return value
  if not copied or not is_url(value):
    return expand_path(value)
  try:
    return str(local_copy(value, MODEL_FILES))
  except UserError as error:
    raise UserError(f'{field}: {error}' if field else str(error)) from error


def path_fields(section: type = RunConfig, path: str = '') -> frozenset[str]:
  """Return the dotted names of the fields whose values can be paths.

  Args:
    section: a dataclass, `RunConfig` or one of its sections.
    path: dotted name of the section.
  """
  names: set[str] = set()
  for field in section_fields(section):
    name = _join(path, field.name)
    names |= path_fields(field.section, name) if field.section else {name} if field.path else set()
  return frozenset(names)


def default_config() -> ConfigDict:
  """Return a config with every field at its default."""
  return _default_section(RunConfig)


def _default_section(section: type) -> ConfigDict:
  config = _empty_section(section)
  for field in section_fields(section):
    if field.section is not None:
      config[field.name] = _default_section(field.section)
    elif isinstance(field.default, Mapping):
      config[field.name] = ConfigDict(dict(field.default))
    else:
      config[field.name] = field.default
  return config


class _Untyped(ConfigDict):
  """A section whose fields may have a word instead of a value of their type.

  A `ConfigDict` refuses a value of another type than the present one, and the command line reads a
  value as the present type. Here both take everything, and `complete_config` checks the types.
  A `FieldReference` per field would do the same, but `update` refuses those of another config.
  """

  def __init__(self):
    super().__init__(type_safe=False)

  def get_type(self, key: str) -> type:
    """Return `object`, which the command line reads as any literal or as text."""
    super().get_type(key)  # raises for an unknown field
    return object


def _empty_section(section: type) -> ConfigDict:
  """Return a section without fields."""
  return _Untyped() if any(field.word for field in section_fields(section)) else ConfigDict()


def complete_config(config: ConfigDict) -> ConfigDict:
  """Return a copy of a config in the form of this version, with the type of every value checked.

  Every config goes through this function. A field that the config lacks gets its default, so
  configs of older versions stay valid. A config without `version` has version 1.

  Args:
    config: the config.

  Raises:
    UserError: if the config has a newer version or an unknown field, or a value has the wrong type.
  """
  if not isinstance(config, ConfigDict):
    raise UserError(
      f'The config is {describe_type(config)}. It must be an ml_collections.ConfigDict, as '
      'configs/default.py returns.'
    )
  check_version(config.get('version', 1), 'the config')
  unknown: list[str] = []
  complete = _complete_section(RunConfig, config, '', unknown)
  if unknown:
    raise UserError(describe_unknown(unknown))
  complete.version = VERSION
  return complete


def _complete_section(
  section: type, config: ConfigDict, path: str, unknown: list[str]
) -> ConfigDict:
  """Return a section with all its fields, and add the names of unknown fields to `unknown`."""
  fields = {field.name: field for field in section_fields(section)}
  others = [_join(path, name) for name in config if name not in fields]
  unknown += [name for name in others if name not in _REMOVED]
  for name in _REMOVED.keys() & {*others}:
    say(f'{name} has no effect any more: {_REMOVED[name]}.')
  complete = _empty_section(section)
  for name, field in fields.items():
    default = _default_section(field.section) if field.section else field.default
    full_name = _join(path, name)
    try:
      value = config[name] if name in config else default
    except RequiredValueError as error:
      raise UserError(f'{full_name} is required. Set --config.{full_name}.') from error
    if field.section or field.keys:
      if not isinstance(value, Mapping | ConfigDict):
        raise UserError(
          f'{full_name} is a section with fields of its own, but got {describe_type(value)}. Set '
          f'its fields, such as config.{full_name}.{next(iter(default))}.'
        )
      value = value if isinstance(value, ConfigDict) else ConfigDict(dict(value))
    if field.section:
      complete[name] = _complete_section(field.section, value, full_name, unknown)
    elif field.keys:
      value = _rename_keys(value, field.renamed, full_name)
      unknown += [_join(full_name, key) for key in value if key not in field.keys]
      (hint,) = typing.get_args(field.type)[1:]
      complete[name] = ConfigDict(
        {
          key: convert(value[key] if key in value else default[key], hint, f'{full_name}.{key}')
          for key in field.keys
        }
      )
    else:
      complete[name] = convert(value, field.type, full_name, field.most, field.word)
  return complete


def _rename_keys(value: ConfigDict, renamed: Mapping[str, str], path: str) -> ConfigDict:
  """Return a mapping with the present names of its keys, and say which ones have changed."""
  former = [key for key in value if key in renamed and renamed[key] not in value]
  for key in former:
    say(f'{path}.{key} is now called {path}.{renamed[key]}. The former name is read as before.')
  return ConfigDict({renamed[key] if key in former else key: value[key] for key in value})


def describe_unknown(names: Sequence[str]) -> str:
  """Return a message that names unknown fields, with the fields that may be meant.

  Args:
    names: dotted names of fields that the config does not have.
  """
  known = list(flatten(default_config().to_dict()))
  last = {name: name.split('.')[-1] for name in known}
  meant = [
    match
    for name in names
    for match in (
      difflib.get_close_matches(name, known, 1)
      or [other for other in known if last[other] == name.split('.')[-1]][:2]
    )
  ]
  hint = f'Did you mean {" or ".join(dict.fromkeys(meant))}? ' if meant else ''
  return (
    f'The config has no field {", ".join(sorted(names))}. {hint}docs/configuration.md lists every '
    'field.'
  )


def _join(path: str, name: str) -> str:
  return f'{path}.{name}' if path else name


def from_config(config: ConfigDict) -> RunConfig:
  """Return the settings of a config as dataclasses, which check their values.

  Args:
    config: a config; absent fields have their defaults. Its plugins must have been loaded.

  Raises:
    UserError: if a value is not allowed.
  """
  config = complete_config(config)
  shared = {'seed': config.seed, 'layers': config.model.layers}
  return _build_section(RunConfig, config, '', dict.fromkeys(('train', 'reward', 'prefer'), shared))


def _build_section(
  section: type, config: ConfigDict, path: str, extra: Mapping[str, Mapping[str, Any]]
) -> Any:
  """Return a section's dataclass from its part of a config.

  Args:
    section: the dataclass.
    config: the section's values.
    path: dotted name of the section, for error messages.
    extra: further arguments of sections, by path.
  """
  values: dict[str, Any] = dict(extra.get(path, {}))
  for field in section_fields(section):
    value = config[field.name]
    if field.section is not None:
      name = _join(path, field.name)
      if field.section in _SERVERS and not value.url:
        _check_absent(field.section, value, name)
        value = None
      else:
        value = _build_section(field.section, value, name, extra)
    if field.path:
      value = expand_paths(value, _join(path, field.name), field.copied)
    values[field.name] = value
  try:
    return section(**values)
  except UserError as error:
    if '.' not in path:
      raise
    # Several sections share this dataclass, so its own message does not say which one is wrong.
    message = str(error).removeprefix(f'{path.split(".")[0]}: ')
    raise UserError(f'{path}: {message}') from error


def _check_absent(server: type, section: ConfigDict, path: str) -> None:
  """Check that no field of a server is set if it has no URL, because it would have no effect."""
  for field in section_fields(server):
    if section[field.name] != field.default:
      raise UserError(
        f'{path}.{field.name} has no effect, because {path}.url is empty. Set the '
        f'URL of the server, or leave {path}.{field.name} out.'
      )
