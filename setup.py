"""Build cai_jax with setuptools; the metadata and the dependencies are in pyproject.toml."""

from setuptools import find_packages, setup

setup(
  packages=find_packages(include=['cai_jax', 'cai_jax.*']),
  package_data={
    'cai_jax': ['*.yaml', 'constitution/*.yaml', 'tiny/*.yaml', 'tiny/model*/*', 'report/*.html']
  },
)
