"""Run the training benchmark's steps with `PeftTrainer` of Tunix, on all parameters of its Llama 3.

The loss, input functions and jitted step are the defaults of google-tunix 0.1.7. It cannot pack
rows. Each step is one padded batch. Its length is that of the longest example, rounded up so that
only a few shapes compile, and shorter than the fixed length that Tunix's own data pipeline pads to.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import optax
from tunix.sft import peft_trainer, utils

from experiments.bench import examples as examples_lib
from experiments.bench import tunix_sampler
from experiments.bench.examples import Example, Rows

PACKAGES = (*tunix_sampler.PACKAGES, 'optax')


def make_model_input(batch: peft_trainer.TrainingInput) -> dict[str, Any]:
  """Return the inputs of the default loss, made from a batch as in Tunix's own programs."""
  real = batch.input_tokens != tunix_sampler.PAD
  return {
    'input_tokens': batch.input_tokens,
    'input_mask': batch.input_mask,
    'positions': utils.build_positions_from_mask(real),
    'attention_mask': utils.make_causal_attn_mask(real),
  }


class System:
  """Tunix's trainer with one model.

  Args:
    folder: the model's folder.
    dtype: of parameters, moments and computation alike.
    platform: ignored.
    options: `longest` and `multiple`, the maximum length of rows and the multiple that lengths are
      rounded up to, in tokens; `optimizer`.
  """

  def __init__(self, folder: pathlib.Path, dtype: str, platform: str, options: dict[str, Any]):
    base = tunix_sampler.System(folder, dtype, platform, {})
    self.mesh, self.longest, self.multiple = base.mesh, options['longest'], options['multiple']
    settings = options['optimizer']
    optimizer = optax.adamw(
      settings['learning_rate'],
      settings['b1'],
      settings['b2'],
      settings['eps'],
      weight_decay=settings['weight_decay'],
    )
    if settings['clip_norm']:
      optimizer = optax.chain(optax.clip_by_global_norm(settings['clip_norm']), optimizer)
    config = peft_trainer.TrainingConfig(eval_every_n_steps=10**9)
    trainer = peft_trainer.PeftTrainer(base.model, optimizer, config)
    trainer.is_managed_externally = True  # otherwise a run closes its checkpoints and metrics
    self.trainer = trainer.with_gen_model_input_fn(make_model_input)

  def take(self, examples: list[Example], steps: list[Rows]) -> None:
    """Store the examples, and the rows of each step."""
    self.examples, self.steps = examples, steps

  def warm(self, batch: int) -> int:
    """Train on one step of each batch shape, and return the number of shapes."""
    shapes: dict[tuple[int, int], int] = {}
    for number, rows in enumerate(self.steps):
      shapes.setdefault(self._shape(rows), number)
    for number in shapes.values():
      self.train(number, number + 1, batch)
    return len(shapes)

  def train(self, first: int, stop: int, batch: int) -> tuple[list[float], int]:
    """Train on steps [first, stop), one batch each.

    Returns:
      The loss of each step, and the number of tokens computed, padding included.
    """
    del batch  # each step is one batch
    steps = self.steps[first:stop]
    losses = []
    with self.mesh:
      self.trainer.train(self._batches(steps, losses))
    losses.append(self._last_loss())
    places = sum(rows * length for rows, length in map(self._shape, steps))
    return [float(loss) for loss in jax.device_get(losses)], places

  def _batches(self, steps: list[Rows], losses: list) -> Iterator[peft_trainer.TrainingInput]:
    """Yield the batch of each step, and append the loss of the step before to `losses`."""
    for number, rows in enumerate(steps):
      if number:
        losses.append(self._last_loss())
      examples = [self.examples[i] for row in rows for i in row]
      tokens, _, targets = examples_lib.pad(examples, self._shape(rows)[1])
      yield peft_trainer.TrainingInput(input_tokens=tokens, input_mask=targets)

  def _last_loss(self) -> jax.Array:
    # The trainer publishes a step's metrics only once the next step has begun.
    return self.trainer._prev_buffered_train_metrics.losses[0]

  def _shape(self, rows: Rows) -> tuple[int, int]:
    """Return the number of examples in a step's batch, and the tokens that each is padded to."""
    longest = max(len(self.examples[i].tokens) for row in rows for i in row)
    rounded = -(-longest // self.multiple) * self.multiple
    return sum(map(len, rows)), min(rounded, self.longest)

  def device_peak_bytes(self) -> int | None:
    """Return the peak memory of the accelerator in bytes, or None on a CPU."""
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else stats['peak_bytes_in_use']
