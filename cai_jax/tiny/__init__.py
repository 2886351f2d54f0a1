"""The embedded default: a small world that can be checked exactly, its text and its model.

Importing the package registers 'tiny' as a constitution and the world's oracle as a scorer.
"""

from cai_jax.tiny import corpus as corpus
from cai_jax.tiny import scorer as scorer
