"""Plugins: files and installed packages that register more implementations."""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import pathlib
import sys
import traceback
from collections.abc import Iterator, Sequence

from cai_jax.runtime.errors import UserError
from cai_jax.runtime.registry import Registry, remove_entries_of, undo_on_error

GROUP = 'cai_jax.plugins'  # entry points that an installed package declares

# The name of the module that each loaded file is imported as, by the file's path. It is a registry
# so that `temporary_registrations` forgets the files whose entries it removes.
_LOADED: Registry[str] = Registry('loaded plugin')


def load_plugins(paths: Sequence[str]) -> dict[str, str]:
  """Import the plugins of installed packages and the given files, each once per process.

  A file that has been edited since it was loaded is imported again, and its new entries replace its
  old ones. A plugin that fails leaves the registries as they were.

  Args:
    paths: Python files. Importing one runs its `register` decorators.

  Returns:
    For each path, the hex digest of the file's content.

  Raises:
    UserError: if a path is not a Python file, or importing a file or a package fails.
  """
  if isinstance(paths, str):
    raise UserError(f'plugins={paths!r} is a string. Give a tuple of paths of .py files.')
  for entry_point in importlib.metadata.entry_points(group=GROUP):
    package = entry_point.dist.name if entry_point.dist is not None else entry_point.value
    with _explain_errors(
      f'entry point {entry_point.name!r} of the package {package!r}',
      f'Fix the package, or uninstall it with `pip uninstall {package}`.',
    ):
      entry_point.load()
  return {path: _import_file(pathlib.Path(path)) for path in paths}


def loaded_plugins() -> dict[str, str]:
  """Return the path of each file that this process has loaded, and a name made from its content.

  `load_plugins` of the paths loads them in another process.
  """
  return dict(_LOADED)


def _import_file(path: pathlib.Path) -> str:
  """Import a file under a name made from its content, and return the digest of that content."""
  if not path.is_file() or path.suffix != '.py':
    raise UserError(f'plugins: {str(path)!r} is not a Python file. Give the path of a .py file.')
  digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
  name = f'cai_jax_plugin_{path.stem}_{digest}'
  if name in _LOADED.values():
    return digest
  file = str(path.resolve())
  remedy = 'Fix the file, or remove it from config.plugins.'
  with _explain_errors(repr(str(path)), remedy, file):
    remove_entries_of(file)
    if file in _LOADED:
      _LOADED.unregister(file)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
      spec.loader.exec_module(sys.modules[name])
    except BaseException:
      del sys.modules[name]
      raise
    _LOADED.register(file)(name)
  return digest


@contextlib.contextmanager
def _explain_errors(plugin: str, remedy: str, file: str = '') -> Iterator[None]:
  """Undo the registrations of a plugin that fails to import, and raise UserError that names it."""
  try:
    with undo_on_error(file):
      yield
  except UserError as error:  # such as a name that is registered twice
    raise UserError(f'plugins: {plugin}: {error}') from error
  except Exception as error:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    raise UserError(
      f'plugins: importing {plugin} failed with {type(error).__name__}: {error} '
      f'({frame.filename}, line {frame.lineno}). {remedy}'
    ) from error
