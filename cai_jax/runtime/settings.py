"""Settings: documented dataclass fields, dotted names, and changes between starts of a run."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from cai_jax.runtime.errors import UserError


def setting(
  default: Any,
  doc: str,
  added: bool = False,
  most: float | None = None,
  path: bool = False,
  copied: bool = True,
  word: str | None = None,
) -> Any:
  """Return a dataclass field with a default and its documentation.

  `configs/default.py` and `docs/configuration.md` are generated from these fields, so each default,
  unit and meaning is stated only here.

  Args:
    default: an immutable value.
    doc: meaning and unit, as one or two sentences.
    added: whether the field was added after version 0.1.0, see `identity`.
    most: largest value that a config may give, so that a mistyped size is refused at the start.
    path: whether the value can be a path, or a tuple of paths. Such a value is expanded when the
      settings of a run are built.
    copied: whether a local copy is read if such a value is a URL. Not so for what a run writes, and
      for code.
    word: a text that the field may have instead of a value of its type, such as 'auto'.
  """
  metadata = {'doc': doc, 'added': added, 'most': most, 'path': path, 'word': word}
  metadata['copied'] = copied
  return dataclasses.field(default=default, metadata=metadata)


def build_options(
  section: type | None, pairs: Sequence[tuple[str, Any]], field: str, owner: str
) -> Any:
  """Return the options of a registered implementation, or None if it has none.

  Args:
    section: dataclass of its options, or None if it has none.
    pairs: (name, value) pairs; options that are not given have their defaults.
    field: the setting that has the pairs, for messages.
    owner: the implementation, for messages, such as "The variant 'debate'".

  Raises:
    UserError: if there is no such option, or a value is not allowed.
  """
  given = dict(pairs)
  known = [option.name for option in dataclasses.fields(section)] if section is not None else []
  unknown = [option for option in given if option not in known]
  if unknown or len(given) < len(pairs):
    allowed = f'has the options {", ".join(known)}' if known else 'has no options'
    wrong = f'{unknown[0]!r} is not an option' if unknown else 'an option is given twice'
    raise UserError(f'{field}: {wrong}. {owner} {allowed}.')
  return section(**given) if section is not None else None


def identity(settings: Any) -> dict[str, Any]:
  """Return the fields of a dataclass that its fingerprints and digests cover.

  A field that was added after version 0.1.0 is left out while it has its default, so that journals
  and datasets of earlier versions stay valid. Mark such a field with `setting(..., added=True)`, or
  with `dataclasses.field(default=..., metadata={'added': True})`.

  Args:
    settings: a dataclass instance. Dataclasses nested in it, also in tuples, lists and dicts, are
      treated in the same way.
  """
  return {
    field.name: _identity_of(getattr(settings, field.name))
    for field in dataclasses.fields(settings)
    if not (field.metadata.get('added') and getattr(settings, field.name) == field.default)
  }


def _identity_of(value: Any) -> Any:
  """Return a value with every dataclass in it replaced by its `identity`."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    return identity(value)
  if isinstance(value, Mapping):
    return {_identity_of(key): _identity_of(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    items = (_identity_of(item) for item in value)
    # A named tuple takes its items as separate arguments.
    return type(value)(*items) if hasattr(value, '_fields') else type(value)(items)
  return value


def flatten(tree: Any, prefix: str = '') -> dict[str, Any]:
  """Return nested dicts as one dict with dotted names, such as {'train.epochs': 1}.

  Args:
    tree: nested dicts; any other value is a leaf.
    prefix: dotted name of `tree` itself.
  """
  if not isinstance(tree, dict) or not tree:
    return {prefix: tree}
  leaves: dict[str, Any] = {}
  for name, value in tree.items():
    leaves |= flatten(value, f'{prefix}.{name}' if prefix else name)
  return leaves


def changed_settings(
  saved: Mapping[str, Any], current: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
  """Return the settings that have changed since an earlier start: {name: (saved, current)}.

  If `saved` lacks a setting, the setting counts as having its default. A run that an older version
  started can therefore continue after a setting is added, if the default keeps the old behaviour.

  Args:
    saved: settings of the earlier start, by dotted name; see `flatten`.
    current: settings of this start, by dotted name.
    defaults: defaults by dotted name. Settings without a known default may be absent.
  """
  # JSON turns tuples into lists, and `saved` has been through JSON.
  saved, current, defaults = (json.loads(json.dumps(dict(x))) for x in (saved, current, defaults))
  changed = {}
  for name in sorted({*saved, *current}):
    old, new = saved.get(name, defaults.get(name)), current.get(name)
    if old != new:
      changed[name] = (old, new)
  return changed
