"""The tokens and FLOPs of each step of a plan, from which throughput and utilization follow."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from cai_jax.data import packing
from cai_jax.data.ragged import Ragged
from cai_jax.data.units import Example, Unit, segment_lengths, shared_counts
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
  lengths, shared = segment_lengths(examples), shared_counts(examples)
  # A prompt that is shared is not computed again for the segments after the first.
  again = lengths.lengths - 1
  spared = Ragged.of_lengths(np.repeat(shared.astype(np.int64), again), again)
  options = {'adapters': config.lora is not None, 'has_logits': not config.registered_loss.head}
  order = [np.array(packing.step_examples(step), np.int64) for step in steps]

  def sum_up(measure: Callable[[np.ndarray], float]) -> np.ndarray:
    """Return the sums of a measure of lengths over the sequences of each step."""
    parts = ((lengths.take(x).values, spared.take(x).values) for x in order)
    return np.array([measure(whole) - measure(repeated) for whole, repeated in parts])

  return Workload(
    tokens=sum_up(np.sum),
    flops=sum_up(lambda x: model.training_flops(x, **options)),
    peak_flops=hardware.peak_flops(list(mesh.devices.flat), config.dtype),
    example_ids=packing.Batches(examples, steps).example_ids,
  )
