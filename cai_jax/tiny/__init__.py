"""The embedded world: a small task with an exact oracle, and a model trained on its texts.

Importing this package registers the name 'tiny' for its constitution, its prompts and its scorer.
"""

from cai_jax.tiny import files, prompts, scorer

__all__ = ['files', 'prompts', 'scorer']
