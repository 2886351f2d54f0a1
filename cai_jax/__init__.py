"""Constitutional AI's supervised phase in JAX and Flax: load a model, sample from it, save it."""

import os

from cai_jax.runtime import interruption as interruption  # first, because imports take seconds

# transformers otherwise advises to install torch, which nothing here needs.
os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')

from cai_jax.model.lm import LM, load, save
from cai_jax.runtime.errors import UserError
from cai_jax.sampling.completions import generate
from cai_jax.sampling.types import Completion, SamplingConfig
from cai_jax.tiny import scorer as scorer  # importing cai_jax.tiny registers the name 'tiny'

__all__ = ['LM', 'Completion', 'SamplingConfig', 'UserError', 'generate', 'load', 'save']
