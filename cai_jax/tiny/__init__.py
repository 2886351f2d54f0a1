"""The embedded world: a small task with an exact oracle, and a model trained on its texts.

Importing this package registers the name 'tiny' for its constitution, its prompts, its scorer
and its labelled pairs, and the judge 'tiny-oracle'.
"""

from cai_jax.tiny import files, judge, prompts, scorer

__all__ = ['files', 'judge', 'prompts', 'scorer']
