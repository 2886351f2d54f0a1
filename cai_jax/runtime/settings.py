"""Settings: documented dataclass fields, and nested dicts as flat names."""

import dataclasses
from typing import Any


def setting(default: Any, doc: str) -> Any:
  """Return a dataclass field with a default and its documentation.

  `configs/default.py` and `docs/configuration.md` are made from these fields, so this is the only
  place where a default, its unit and its meaning are written.

  Args:
    default: an immutable value.
    doc: meaning and unit, as one or two sentences.
  """
  return dataclasses.field(default=default, metadata={'doc': doc})


def flatten(tree: Any, prefix: str = '') -> dict[str, Any]:
  """Return nested dicts as one dict with dotted names, such as {'train.epochs': 1}."""
  if not isinstance(tree, dict) or not tree:
    return {prefix: tree}
  leaves: dict[str, Any] = {}
  for name, value in tree.items():
    leaves |= flatten(value, f'{prefix}.{name}' if prefix else name)
  return leaves
