"""The packages that cai_jax needs, and their versions."""

import functools
import importlib.metadata
import pathlib
import tomllib

from packaging.requirements import Requirement

from cai_jax.runtime.errors import UserError


def check_packages() -> None:
  """Check that each required package is installed in a version that cai_jax supports.

  Raises:
    UserError: if one is missing or too old; the message names it and both versions.
  """
  for requirement in requirements():
    try:
      version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
      version = None
    needed = f'{requirement.name}{requirement.specifier}'
    if version is None:
      raise UserError(
        f'The package {requirement.name} is not installed, and cai_jax needs {needed}. Run '
        f"`pip install '{needed}'`."
      )
    if not requirement.specifier.contains(version, prereleases=True):
      raise UserError(
        f'The package {requirement.name} has version {version}, but cai_jax needs {needed}. Run '
        f"`pip install '{needed}'`."
      )


@functools.cache
def requirements() -> tuple[Requirement, ...]:
  """Return the required packages, from pyproject.toml beside the package or from its metadata."""
  path = pathlib.Path(__file__).resolve().parents[2] / 'pyproject.toml'
  project = tomllib.loads(path.read_text(encoding='utf-8'))['project'] if path.is_file() else {}
  if project.get('name') == 'cai_jax':
    lines = project['dependencies']
  else:
    try:
      lines = importlib.metadata.requires('cai_jax') or []
    except importlib.metadata.PackageNotFoundError:  # a copy of the package alone
      lines = []
  parsed = map(Requirement, lines)
  return tuple(r for r in parsed if r.marker is None or r.marker.evaluate({'extra': ''}))
