"""Run the training benchmark's steps with `cai_jax.training`."""

import pathlib
from typing import Any

import jax
import numpy as np

from cai_jax.data import packing
from cai_jax.data.units import Example as TrainingExample
from cai_jax.model import lm as lm_lib
from cai_jax.runtime.mesh import token_sharding
from cai_jax.training.attention import resolve_attention
from cai_jax.training.config import TrainConfig
from cai_jax.training.state import init_state
from cai_jax.training.step import make_train_step
from cai_jax.training.trainable import trained_graph
from experiments.bench.examples import Example, Rows

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax')


class System:
  """The training loop of `cai_jax.training`, without logs and checkpoints.

  Args:
    folder: the model's folder.
    dtype: of computation; parameters and moments are f32.
    platform: ignored.
    options: `rows` and `length` of a step's batch; `optimizer` and `train`, fields of TrainConfig.
  """

  def __init__(self, folder: pathlib.Path, dtype: str, platform: str, options: dict[str, Any]):
    del platform  # JAX_PLATFORMS selects it
    lm = lm_lib.load(folder, dtype, param_dtype='float32')
    self.bucket = packing.Bucket(options['length'], options['rows'])
    config = TrainConfig(
      batch_size=options['rows'],
      max_length=options['length'],
      loss_normalization='token',
      schedule='constant',
      warmup=0.0,
      dtype=dtype,
      **options['optimizer'],
      **options['train'],
    )
    config = resolve_attention(config, lm.mesh, [options['length']], lm.config)
    steps = 1000  # a constant schedule does not depend on it
    graph, layout, shapes = trained_graph(lm.config, config)
    shapes = jax.eval_shape(layout.stack, shapes)
    self.step = make_train_step(graph, shapes, config, steps, lm.mesh)
    self.state = init_state(lm.params, config, lm.mesh, layout)
    self.sharding = token_sharding(lm.mesh)

  def take(self, examples: list[Example], steps: list[Rows]) -> None:
    """Store the examples, and the rows of each step."""
    self.items = [
      TrainingExample(np.array(e.tokens, np.int32), np.arange(len(e.tokens)) >= e.prompt)
      for e in examples
    ]
    self.steps = steps

  def warm(self, batch: int) -> int:
    """Train on one step and return the number of batch shapes, which is 1."""
    self.train(0, 1, batch)
    return 1

  def train(self, first: int, stop: int, batch: int) -> tuple[list[float], int]:
    """Train on steps [first, stop), preparing batches ahead as `fit` does.

    Returns:
      The loss of each step, and the number of tokens computed, padding included.
    """
    del batch  # the step splits its batch by `accumulation`
    plan = [packing.Step(self.bucket, tuple(map(tuple, rows))) for rows in self.steps[first:stop]]
    place = lambda batch: jax.device_put(batch, self.sharding)  # noqa: E731
    losses = []
    for arrays in packing.iterate_batches(packing.Batches(self.items, plan), place):
      self.state, metrics = self.step(self.state, arrays)
      losses.append(metrics['loss'])
    losses = [float(loss) for loss in jax.device_get(losses)]
    return losses, len(plan) * self.bucket.rows * self.bucket.length

  def device_peak_bytes(self) -> int | None:
    """Return the peak memory of the accelerator in bytes, or None on a CPU."""
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else stats['peak_bytes_in_use']
