"""The embedded default: a small world that can be checked exactly, its text and its model.

Importing the package registers the name 'tiny' for its constitution, its prompts and its scorer.
"""

from cai_jax.tiny import corpus as corpus
from cai_jax.tiny import prompts as prompts
from cai_jax.tiny import scorer as scorer
