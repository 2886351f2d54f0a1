"""Model families, one per file; `family.FAMILIES` holds them by Hugging Face's model_type."""

from cai_jax.runtime.registry import import_submodules

import_submodules(__name__, __path__)
