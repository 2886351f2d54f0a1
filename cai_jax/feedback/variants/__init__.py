"""The variants of the chain that come with the package, one file each."""

from cai_jax.feedback.chain import VARIANTS
from cai_jax.feedback.variants import critique, direct, empty, shuffled

__all__ = ['VARIANTS', 'critique', 'direct', 'empty', 'shuffled']
