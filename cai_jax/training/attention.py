"""The attention kernel of a training run: what 'auto' stands for."""

import dataclasses
from collections.abc import Sequence

from jax.sharding import Mesh

from cai_jax.model.attention.kernels.kernel import AUTO, choose_kernel
from cai_jax.training.config import TrainConfig


def resolve_attention(
  config: TrainConfig, mesh: Mesh, lengths: Sequence[int], head_dim: int
) -> TrainConfig:
  """Return the settings with the name of a kernel in place of 'auto'.

  Args:
    config: the run's settings.
    mesh: the devices.
    lengths: numbers of tokens per row of all batches.
    head_dim: size of a head of the model.
  """
  if config.attention != AUTO:
    return config
  return dataclasses.replace(config, attention=choose_kernel(mesh, config.dtype, lengths, head_dim))
