"""Attention kernels for packed rows, one per file; `kernel.KERNELS` holds them by name."""

from cai_jax.runtime.registry import import_submodules

import_submodules(__name__, __path__)
