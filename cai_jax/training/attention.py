"""The attention kernel of a training run: what 'auto' stands for."""

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

from jax.sharding import Mesh

from cai_jax.model.attention.kernels.kernel import AUTO, choose_kernel
from cai_jax.model.config import ModelConfig
from cai_jax.training.fit_config import FitConfig

C = TypeVar('C', bound=FitConfig)


def resolve_attention(config: C, mesh: Mesh, lengths: Sequence[int], model: ModelConfig) -> C:
  """Return the settings with the name of a kernel in place of 'auto'.

  Args:
    config: the run's settings.
    mesh: the devices.
    lengths: numbers of tokens per row of all batches.
    model: the shape of the model.
  """
  if config.attention != AUTO:
    return config
  sizes = [kind.head_dim for kind in model.kinds]
  needs = sizes, model.attention_cap, model.sinks, config.shares_tokens
  name = choose_kernel(mesh, config.dtype, lengths, *needs)
  return dataclasses.replace(config, attention=name)
