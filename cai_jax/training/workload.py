"""The tokens and FLOPs of each step of a plan, from which throughput and utilization follow."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from cai_jax.data import packing
from cai_jax.data.examples import Example
from cai_jax.data.units import Unit, as_unit
from cai_jax.model.config import ModelConfig
from cai_jax.runtime import hardware
from cai_jax.training.fit_config import FitConfig


@dataclasses.dataclass(frozen=True)
class Workload:
  """What each step computes, known before training starts.

  Attributes:
    tokens: i64[steps], number of tokens of prompts and responses, without padding.
    flops: f64[steps], FLOPs of the forward and backward pass on these tokens, without
      recomputation.
    peak_flops: peak FLOP/s of all devices together; None if unknown.
    example_ids: function that returns the ids of the examples in a step, given its index from 0.
  """

  tokens: np.ndarray
  flops: np.ndarray
  peak_flops: float | None
  example_ids: Callable[[int], list[str]]


def measure_workload(
  model: ModelConfig,
  examples: Sequence[Example | Unit],
  steps: Sequence[packing.Step],
  config: FitConfig,
  mesh: Mesh,
) -> Workload:
  """Return the workload of a plan.

  Args:
    model: architecture of the model.
    examples: the training examples or units.
    steps: which examples are in which step, see `packing.plan`.
    config: the run's settings.
    mesh: the devices.
  """
  lengths = [[len(segment.tokens) for segment in as_unit(e).segments] for e in examples]
  step_lengths = [
    np.array([length for row in step.rows for i in row for length in lengths[i]]) for step in steps
  ]
  options = {'adapters': config.lora is not None, 'has_logits': not config.registered_loss.head}
  return Workload(
    tokens=np.array([x.sum() for x in step_lengths]),
    flops=np.array([model.training_flops(x, **options) for x in step_lengths]),
    peak_flops=hardware.peak_flops(list(mesh.devices.flat), config.dtype),
    example_ids=packing.Batches(examples, steps).example_ids,
  )
