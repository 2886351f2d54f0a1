"""Names of models and files as others may see them: without folders of this machine and secrets."""

import pathlib
import urllib.parse
from collections.abc import Iterable, Mapping
from typing import Any

from cai_jax.pipeline.relative_paths import split_component
from cai_jax.pipeline.schema import path_fields
from cai_jax.tiny.files import MODELS


def public_name(name: str) -> str:
  """Return the name of a model or file as others may see it.

  A path loses the folders in which the file is on this machine. A URL loses user, password, query
  and fragment, which can be credentials; it keeps its server or bucket.

  Args:
    name: an embedded model, a hub name, a URL or a path.
  """
  if '://' in name:
    parts = urllib.parse.urlsplit(name)
    return f'{parts.scheme}://{parts.netloc.rpartition("@")[2]}{parts.path}'
  path = pathlib.Path(name).expanduser()
  for embedded, folder in MODELS.items():
    if path.is_absolute() and path.resolve() == folder.resolve():
      return embedded
  is_local = path.is_absolute() or name.startswith(('.', '~')) or path.exists()
  return path.name if is_local else name


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
    return _public_component(value)
  return public_name(value) if name in paths or name.endswith('url') else value


def _public_component(component: str) -> str:
  """Return a component of a mixture, such as 'FILE:WEIGHT' or 'NAME/SPLIT=COPY:WEIGHT'."""
  before, path, weight = split_component(component)
  is_copy = bool(before) and '://' not in path  # of a published set, in a file or folder
  return before + (pathlib.Path(path).name if is_copy else public_name(path)) + weight


def join_names(names: Iterable[str]) -> str:
  """Return names as a list in a sentence: 'a', 'a and b', 'a, b and c'.

  Args:
    names: the names.
  """
  *first, last = list(names) or ['']
  return f'{", ".join(first)} and {last}' if first else last
