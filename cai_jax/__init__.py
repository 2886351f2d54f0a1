"""Constitutional AI's supervised phase in JAX and Flax."""

from cai_jax.model.lm import LM, load, save

__all__ = ['LM', 'load', 'save']
