"""Constitutional AI's supervised phase in JAX and Flax: load a model, sample from it, save it."""

import os

# At import transformers advises to install torch, which nothing here needs.
os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')

from cai_jax.model.lm import LM, load, save
from cai_jax.sampling.completions import generate
from cai_jax.sampling.types import Completion, SamplingConfig

__all__ = ['LM', 'Completion', 'SamplingConfig', 'generate', 'load', 'save']
