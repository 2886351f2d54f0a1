"""Plugins: files and installed packages that register more implementations."""

import hashlib
import importlib.metadata
import importlib.util
import pathlib
import sys
import traceback
from collections.abc import Sequence

from cai_jax.runtime.errors import UserError

GROUP = 'cai_jax.plugins'  # entry points that an installed package declares


def load_plugins(paths: Sequence[str]) -> dict[str, str]:
  """Import the plugins of installed packages and the given files, each once per process.

  Args:
    paths: Python files. Importing one runs its `register` decorators.

  Returns:
    For each path, the hex digest of the file's content.

  Raises:
    UserError: if a path is not a Python file, or importing it fails.
  """
  if isinstance(paths, str):
    raise UserError(f'plugins={paths!r} is a string. Give a tuple of paths of .py files.')
  for entry_point in importlib.metadata.entry_points(group=GROUP):
    entry_point.load()
  return {path: _import_file(pathlib.Path(path)) for path in paths}


def _import_file(path: pathlib.Path) -> str:
  """Import a file under a name made from its content, and return the digest of that content."""
  if not path.is_file() or path.suffix != '.py':
    raise UserError(f'plugins: {str(path)!r} is not a Python file. Give the path of a .py file.')
  digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
  name = f'cai_jax_plugin_{path.stem}_{digest}'
  if name not in sys.modules:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
      spec.loader.exec_module(module)
    except UserError as error:  # such as a name that is registered twice
      del sys.modules[name]
      raise UserError(f'plugins: {str(path)!r}: {error}') from error
    except Exception as error:
      del sys.modules[name]
      frame = traceback.extract_tb(error.__traceback__)[-1]
      raise UserError(
        f'plugins: importing {str(path)!r} failed with {type(error).__name__}: {error} '
        f'({frame.filename}, line {frame.lineno}). Fix the file, or remove it from config.plugins.'
      ) from error
  return digest
