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
    tokens: i64[steps], number of tokens of prompts and responses, without padding. Tokens that
      several segments share count once.
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
  units = [as_unit(example) for example in examples]
  lengths = [[len(segment.tokens) for segment in unit.segments] for unit in units]
  # A prompt that is shared is not computed again for the segments after the first.
  spared = [[unit.shared] * (len(unit.segments) - 1) for unit in units]
  options = {'adapters': config.lora is not None, 'has_logits': not config.registered_loss.head}

  def sum_up(measure: Callable[[np.ndarray], float]) -> np.ndarray:
    """Return the sums of a measure of lengths over the sequences of each step."""

    def of_step(step, lengths):
      sequences = [n for row in step.rows for i in row for n in lengths[i]]
      return measure(np.array(sequences, np.int64))

    return np.array([of_step(step, lengths) - of_step(step, spared) for step in steps])

  return Workload(
    tokens=sum_up(np.sum),
    flops=sum_up(lambda x: model.training_flops(x, **options)),
    peak_flops=hardware.peak_flops(list(mesh.devices.flat), config.dtype),
    example_ids=packing.Batches(examples, steps).example_ids,
  )
