"""Every field of a run at its default. Other configs set only what differs.

docs/configuration.md lists the fields with their meanings and units.
"""

from cai_jax.pipeline.schema import default_config


def get_config():
  """Return a config with every field at its default."""
  return default_config()
