"""Settings: documented dataclass fields, nested dicts as flat names, and changes between starts."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any


def setting(default: Any, doc: str, added: bool = False) -> Any:
  """Return a dataclass field with a default and its documentation.

  `configs/default.py` and `docs/configuration.md` are made from these fields, so this is the only
  place where a default, its unit and its meaning are written.

  Args:
    default: an immutable value.
    doc: meaning and unit, as one or two sentences.
    added: whether the field was added after version 0.1.0, see `identity`.
  """
  return dataclasses.field(default=default, metadata={'doc': doc, 'added': added})


def identity(settings: Any) -> dict[str, Any]:
  """Return the fields of a dataclass that fingerprints and digests are made of.

  A field that was added after version 0.1.0 is left out while it has its default, so that journals
  and datasets of earlier versions stay valid. Mark such a field with `setting(..., added=True)`, or
  with `dataclasses.field(default=..., metadata={'added': True})`.

  Args:
    settings: a dataclass instance. Nested dataclasses become dicts.
  """
  values = dataclasses.asdict(settings)
  for field in dataclasses.fields(settings):
    if field.metadata.get('added') and getattr(settings, field.name) == field.default:
      del values[field.name]
  return values


def flatten(tree: Any, prefix: str = '') -> dict[str, Any]:
  """Return nested dicts as one dict with dotted names, such as {'train.epochs': 1}."""
  if not isinstance(tree, dict) or not tree:
    return {prefix: tree}
  leaves: dict[str, Any] = {}
  for name, value in tree.items():
    leaves |= flatten(value, f'{prefix}.{name}' if prefix else name)
  return leaves


def changed_settings(
  saved: Mapping[str, Any], current: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
  """Return the settings that differ from those of an earlier start: {name: (saved, current)}.

  A setting that `saved` lacks counts as its default. So a folder that an older version wrote stays
  usable after a setting is added, as long as the new default keeps the old behaviour.

  Args:
    saved: what the earlier start stored, by dotted name; see `flatten`.
    current: the same for this start.
    defaults: the default of each setting; names that no default is known for may be left out.
  """
  # JSON turns tuples into lists, and `saved` has been through JSON.
  saved, current, defaults = (json.loads(json.dumps(dict(x))) for x in (saved, current, defaults))
  changed = {}
  for name in sorted({*saved, *current}):
    old, new = saved.get(name, defaults.get(name)), current.get(name)
    if old != new:
      changed[name] = (old, new)
  return changed
