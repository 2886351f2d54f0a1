"""Named implementations that users can add to, such as variants, losses and scorers."""

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from cai_jax.runtime.errors import UserError

T = TypeVar('T')


class Registry(Mapping[str, T]):
  """A read-only mapping from a name to an implementation, filled by a decorator.

  Args:
    kind: what an entry is, such as 'training loss', for error messages.
  """

  def __init__(self, kind: str):
    self._kind = kind
    self._entries: dict[str, T] = {}

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
      return entry

    return store

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
