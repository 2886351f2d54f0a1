"""Names of models and files as others may see them: without the folders of this machine."""

import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from cai_jax.pipeline.schema import path_fields
from cai_jax.tiny.files import MODELS

_COPY = re.compile(r'=[^:=]*/')  # in 'NAME=FOLDER/FILE:WEIGHT', a component of a mixture


def public_name(name: str) -> str:
  """Return the name of a model or file without the folders in which it is on this machine.

  Args:
    name: an embedded model, a hub name, a URL or a path.
  """
  path = pathlib.Path(name).expanduser()
  for embedded, folder in MODELS.items():
    if path.is_absolute() and path.resolve() == folder.resolve():
      return embedded
  is_local = path.is_absolute() or name.startswith(('.', '~')) or path.exists()
  return path.name if is_local and '://' not in name else name


def public_values(values: Mapping[str, Any]) -> dict[str, Any]:
  """Return a config with the public names of models and files.

  Args:
    values: the config as nested dicts of JSON types.
  """
  return _renamed(values, '', path_fields())


def _renamed(value: Any, name: str, paths: frozenset[str]) -> Any:
  if isinstance(value, Mapping):
    return {k: _renamed(v, f'{name}.{k}' if name else k, paths) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_renamed(item, name, paths) for item in value]
  if not isinstance(value, str) or not value:
    return value
  if name.endswith('.mixture'):
    return _COPY.sub('=', value) if '=' in value else _without_folder(value)
  return public_name(value) if name in paths else value


def _without_folder(component: str) -> str:
  """Return 'FILE:WEIGHT' without the folder of the file; 'NAME/SPLIT:WEIGHT' stays."""
  place, colon, weight = component.rpartition(':')
  return f'{public_name(place)}{colon}{weight}' if colon else public_name(component)


def join_names(names: Iterable[str]) -> str:
  """Return names as a list in a sentence: 'a', 'a and b', 'a, b and c'.

  Args:
    names: the names.
  """
  *first, last = list(names) or ['']
  return f'{", ".join(first)} and {last}' if first else last
