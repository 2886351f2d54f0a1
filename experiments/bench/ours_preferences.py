"""Run the preference benchmark's steps with `cai_jax.training`."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from cai_jax.data import packing
from cai_jax.data.units import Example as TrainingExample
from cai_jax.data.units import Unit, share_prompt
from cai_jax.model import lm as lm_lib
from cai_jax.model.transformer import abstract_model
from cai_jax.runtime.mesh import token_sharding
from cai_jax.training.attention import resolve_attention
from cai_jax.training.prefer_config import PreferConfig
from cai_jax.training.reference import compute_reference, make_program
from cai_jax.training.state import init_state
from cai_jax.training.step import make_train_step, place_batch
from experiments.bench import pairs as pairs_lib
from experiments.bench.examples import Example, Rows

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax')


class System:
  """The training loop of `cai_jax.training` with DPO, without logs and checkpoints.

  Args:
    folder: the model's folder.
    dtype: of computation; parameters and moments are f32.
    platform: ignored.
    options: `rows` and `length` of a step's batch, `accumulation`, `share_prompts`, `beta` and
      `optimizer`.
  """

  def __init__(self, folder: pathlib.Path, dtype: str, platform: str, options: dict[str, Any]):
    del platform  # JAX_PLATFORMS selects it
    lm = lm_lib.load(folder, dtype, param_dtype='float32')
    self.bucket = packing.Bucket(options['length'], options['rows'])
    config = PreferConfig(
      objective='dpo',
      options=(('beta', options['beta']),),
      batch_size=options['rows'],
      max_length=options['length'],
      accumulation=options['accumulation'],
      schedule='constant',
      warmup=0.0,
      dtype=dtype,
      share_prompts=options['share_prompts'],
      **options['optimizer'],
    )
    self.config = resolve_attention(config, lm.mesh, [options['length']], lm.config)
    graph, _ = abstract_model(lm.config, dtype)
    steps = 1000  # a constant schedule does not depend on it
    self.step = make_train_step(graph, lm.params, self.config, steps, lm.mesh)
    self.state = init_state(lm.params, self.config, lm.mesh)
    self.program = make_program(lm, self.config)
    self.lm = dataclasses.replace(lm, params=None)  # the state has copies
    self.sharding = token_sharding(lm.mesh)
    self.examples: list[Example] = []

  def take(self, examples: list[Example], steps: list[Rows]) -> None:
    """Store the pairs and the rows of each step, and compute the reference of new pairs."""
    self.steps = steps
    if examples == self.examples:
      return
    self.examples = examples
    self.units = [
      Unit(tuple(map(_convert, pair)), {'probability': (1.0, 1.0)}, f'pair {i}')
      for i, pair in enumerate(pairs_lib.pair_up(examples))
    ]
    if self.config.share_prompts:
      self.units = [share_prompt(unit) for unit in self.units]
    references = self._compute_reference(self.units)
    self.units = [
      unit._replace(values={**unit.values, 'reference': tuple(numbers)})
      for unit, numbers in zip(self.units, references, strict=True)
    ]

  def reference(self, first: int, stop: int, batch: int) -> None:
    """Compute the reference's log-probabilities of the pairs of steps [first, stop) once more.

    It takes the same time with the trained parameters, which the result is not used with.
    """
    del batch
    indices = [i for rows in self.steps[first:stop] for row in rows for i in row]
    self._compute_reference([self.units[i] for i in indices])

  def _compute_reference(self, units: Sequence[Unit]) -> list[list[float]]:
    lm = dataclasses.replace(self.lm, params=self.state.params)
    return compute_reference(lm, units, self.config, self.program)

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
    place = lambda batch: place_batch(batch, self.sharding)  # noqa: E731
    losses = []
    for arrays in packing.iterate_batches(packing.Batches(self.units, plan), place):
      self.state, metrics = self.step(self.state, arrays)
      losses.append(metrics['loss'])
    losses = [float(loss) for loss in jax.device_get(losses)]
    return losses, len(plan) * self.bucket.rows * self.bucket.length

  def device_peak_bytes(self) -> int | None:
    """Return the peak memory of the accelerator in bytes, or None on a CPU."""
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else stats['peak_bytes_in_use']


def _convert(example: Example) -> TrainingExample:
  tokens = np.array(example.tokens, np.int32)
  return TrainingExample(tokens, np.arange(len(tokens)) >= example.prompt)
