"""Every field of a run with its default; other configs state only what differs."""

from cai_jax.pipeline.schema import default_config


def get_config():
  """Return the default config."""
  return default_config()
