"""Relative paths in a config, and what they meant where the run was started.

'models/base' can be a folder or a model of the hub. Which one it was can only be seen in the folder
in which the run was started, so each stage records its relative paths in the manifest.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from cai_jax.data.sets import PROMPT_SETS
from cai_jax.pipeline.schema import expand_paths, path_fields


def relative_paths(values: Mapping[str, Any]) -> dict[str, str]:
  """Return the relative paths of a config that name a file or folder: as written → absolute.

  Args:
    values: the config as nested dicts of JSON types.
  """
  found = {}
  for path in _paths(values, '', path_fields()):
    # Names of components are no paths, even if there is a file of that name.
    if not os.path.isabs(path) and os.path.isabs(expand_paths(path, copied=False)):
      found[path] = os.path.abspath(os.path.expanduser(path))
  return found


def make_absolute(values: Mapping[str, Any], paths: Mapping[str, str]) -> dict[str, Any]:
  """Return a config with absolute paths in place of relative ones.

  Args:
    values: the config as nested dicts of JSON types.
    paths: the relative paths, from `relative_paths`.
  """
  return _replaced(values, '', path_fields(), paths)


def split_component(component: str) -> tuple[str, str, str]:
  """Return the parts of a component of a mixture, see `cai_jax.data.mixtures`.

  Args:
    component: such as 'FILE:2' or 'NAME/SPLIT=COPY:2'.

  Returns:
    What stands before the path, such as 'NAME/SPLIT='; the path, or 'NAME/SPLIT'; the rest, such as
    ':2'. Joined they are the component.
  """
  what, colon, weight = component.rpartition(':')
  what = what if colon else component
  name, equals, copy = what.partition('=')
  if equals and '://' not in name:  # else it belongs to the query of a URL
    return name + equals, copy, colon + weight
  return '', what, colon + weight


def _paths(value: Any, name: str, fields: frozenset[str]) -> Iterator[str]:
  """Yield the texts of a config that can be paths."""
  if isinstance(value, Mapping):
    for key, item in value.items():
      yield from _paths(item, f'{name}.{key}' if name else key, fields)
  elif isinstance(value, list | tuple):
    for item in value:
      yield from _paths(item, name, fields)
  elif isinstance(value, str) and name.endswith('.mixture'):
    before, path, _ = split_component(value)
    if before or path.partition('/')[0] not in PROMPT_SETS:
      yield path
  elif isinstance(value, str) and name in fields:
    yield value


def _replaced(value: Any, name: str, fields: frozenset[str], paths: Mapping[str, str]) -> Any:
  if isinstance(value, Mapping):
    return {
      key: _replaced(item, f'{name}.{key}' if name else key, fields, paths)
      for key, item in value.items()
    }
  if isinstance(value, list | tuple):
    return [_replaced(item, name, fields, paths) for item in value]
  if isinstance(value, str) and name.endswith('.mixture'):
    before, path, weight = split_component(value)
    return before + paths.get(path, path) + weight
  return paths.get(value, value) if isinstance(value, str) and name in fields else value
