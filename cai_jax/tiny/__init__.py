"""The embedded default: a small world that can be checked exactly, its text and its model.

Importing the package registers the world's oracle as the scorer 'tiny'.
"""

from cai_jax.tiny import scorer as scorer
