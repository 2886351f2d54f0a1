"""Named implementations that users can add to, such as variants, losses and scorers."""

import contextlib
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any, TypeVar

from cai_jax.runtime.errors import UserError

T = TypeVar('T')
_REGISTRIES: list['Registry[Any]'] = []


class Registry(Mapping[str, T]):
  """A mapping from a name to an implementation, filled by a decorator.

  Args:
    kind: what an entry is, such as 'training loss', for error messages.
  """

  def __init__(self, kind: str):
    self._kind = kind
    self._entries: dict[str, T] = {}
    self._files: dict[str, str] = {}  # the file that registered each entry
    _REGISTRIES.append(self)

  def register(self, name: str) -> Callable[[T], T]:
    """Return a decorator that stores its argument under `name`.

    Args:
      name: the name of the entry, which settings use.

    Raises:
      UserError: if the name is taken.
    """

    def store(entry: T) -> T:
      if name in self._entries:
        raise UserError(
          f'The {self._kind} {name!r} is registered twice. Give one of the two another name.'
        )
      self._entries[name] = entry
      self._files[name] = _registering_file()
      return entry

    return store

  def unregister(self, name: str) -> None:
    """Remove an entry.

    Args:
      name: the name of the entry.

    Raises:
      UserError: if there is no such entry.
    """
    self[name]
    del self._entries[name], self._files[name]

  def get(self, name: str, default: Any = None) -> Any:
    """Return the entry of a name, or `default` if there is none.

    Args:
      name: the name of the entry.
      default: what to return if no entry has that name.
    """
    return self._entries.get(name, default)

  def __getitem__(self, name: str) -> T:
    if name not in self._entries:
      raise UserError(
        f'There is no {self._kind} named {name!r}. The registered names are '
        f'{", ".join(sorted(self))}. To add one, register it in a file of your own and name that '
        'file in config.plugins.'
      )
    return self._entries[name]

  def __contains__(self, name: object) -> bool:
    return name in self._entries

  def __iter__(self) -> Iterator[str]:
    return iter(self._entries)

  def __len__(self) -> int:
    return len(self._entries)


# Registrations of a file or of a block of code, in all registries.

_State = list[tuple[dict[str, Any], dict[str, str]]]  # each registry's entries and their files


@contextlib.contextmanager
def temporary_registrations() -> Iterator[None]:
  """Restore all registries at the end of the block, which undoes what it registers.

  Tests use it, for example `with temporary_registrations(): load_plugins([path])`.
  """
  before = _save_state()
  try:
    yield
  finally:
    # A registry that the block creates is left alone: its module stays imported.
    for registry, (entries, files) in zip(_REGISTRIES, before, strict=False):
      registry._entries, registry._files = entries, files


@contextlib.contextmanager
def undo_on_error(failing_file: str = '') -> Iterator[None]:
  """Restore all registries if the block raises.

  Entries of other modules that the block has imported completely are kept. Python would not run
  such a module again, so its entries would be lost.

  Args:
    failing_file: path of the file that the block imports, or '' if the block imports a module by
      name. None of its new entries is kept.
  """
  before = _save_state()
  try:
    yield
  except BaseException:
    complete = {getattr(module, '__file__', None) for module in list(sys.modules.values())}
    complete.discard(failing_file)
    for registry, (entries, files) in zip(_REGISTRIES, before, strict=False):
      for name, file in registry._files.items():
        if name not in entries and file in complete:
          entries[name], files[name] = registry._entries[name], file
      registry._entries, registry._files = entries, files
    raise


def remove_entries_of(file: str) -> None:
  """Remove the entries that a file has registered, before it is imported again.

  Args:
    file: path of the file, as in the `__file__` of its module.
  """
  for registry in _REGISTRIES:
    for name in [name for name, other in registry._files.items() if other == file]:
      registry.unregister(name)


def _save_state() -> _State:
  return [(dict(registry._entries), dict(registry._files)) for registry in _REGISTRIES]


def _registering_file() -> str:
  """Return the file of the innermost module that is being imported, or ''."""
  frame: FrameType | None = sys._getframe()
  while frame is not None and frame.f_code.co_name != '<module>':
    frame = frame.f_back
  return '' if frame is None else frame.f_code.co_filename


def import_submodules(package: str, path: Iterable[str]) -> None:
  """Import every module of a package, so that their `register` decorators run.

  A package with one implementation per file calls this function in its `__init__.py`. A new
  implementation then only needs a new file.

  Args:
    package: the package's `__name__`.
    path: the package's `__path__`.
  """
  for module in pkgutil.iter_modules(path):
    importlib.import_module(f'{package}.{module.name}')
