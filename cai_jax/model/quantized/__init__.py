"""Formats of quantized kernels, one per file; `kernel.FORMATS` holds them by name."""

from cai_jax.runtime.registry import import_submodules

import_submodules(__name__, __path__)
