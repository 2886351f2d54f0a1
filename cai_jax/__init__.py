"""Constitutional AI's supervised phase in JAX and Flax: load a model, sample from it, save it."""

from cai_jax.model.lm import LM, load, save
from cai_jax.sampling.generate import generate
from cai_jax.sampling.types import Completion, SamplingConfig

__all__ = ['LM', 'Completion', 'SamplingConfig', 'generate', 'load', 'save']
