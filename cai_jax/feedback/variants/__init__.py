"""The variants of the chain that come with the package, one file each."""

from cai_jax.feedback.chain import VARIANTS
from cai_jax.runtime.registry import import_submodules

__all__ = ['VARIANTS']

import_submodules(__name__, __path__)
