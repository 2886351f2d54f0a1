"""The training benchmark's steps through `PeftTrainer` of Tunix, on all parameters of its Llama 3.

Its loss, input functions and jitted step are the defaults of google-tunix 0.1.7. It cannot pack. A
step's examples are one batch, filled up to the longest of them rounded up, so that a few shapes are
compiled: shorter than the one fixed length that its own data pipeline pads to.
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


def model_input(batch: peft_trainer.TrainingInput) -> dict[str, Any]:
  """What the default loss takes, as Tunix's own programs make it of a batch."""
  real = batch.input_tokens != tunix_sampler.PAD
  return {
    'input_tokens': batch.input_tokens,
    'input_mask': batch.input_mask,
    'positions': utils.build_positions_from_mask(real),
    'attention_mask': utils.make_causal_attn_mask(real),
  }


class System:
  """A trainer.

  Args:
    folder: of the model.
    dtype: of parameters, moments and computation: Tunix has one for all.
    options: `longest` and `multiple` tokens of a batch's rows; `optimizer`.
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
    trainer.is_managed_externally = True  # else its checkpoints and metrics are closed after a run
    self.trainer = trainer.with_gen_model_input_fn(model_input)

  def take(self, examples: list[Example], steps: list[Rows]) -> None:
    """Keeps the examples, and the rows of each step."""
    self.examples, self.steps = examples, steps

  def warm(self, batch: int) -> int:
    """Trains on one step of each shape; their number."""
    shapes: dict[tuple[int, int], int] = {}
    for number, rows in enumerate(self.steps):
      shapes.setdefault(self._shape(rows), number)
    for number in shapes.values():
      self.train(number, number + 1, batch)
    return len(shapes)

  def train(self, first: int, stop: int, batch: int) -> tuple[list[float], int]:
    """(losses of the steps, tokens computed)."""
    del batch  # a step is one batch
    steps = self.steps[first:stop]
    losses = []
    with self.mesh:
      self.trainer.train(self._batches(steps, losses))
    losses.append(self._last_loss())
    places = sum(rows * length for rows, length in map(self._shape, steps))
    return [float(loss) for loss in jax.device_get(losses)], places

  def _batches(self, steps: list[Rows], losses: list) -> Iterator[peft_trainer.TrainingInput]:
    """The steps' batches; adds to `losses` those of the steps before, known by then."""
    for number, rows in enumerate(steps):
      if number:
        losses.append(self._last_loss())
      examples = [self.examples[i] for row in rows for i in row]
      tokens, _, learnt = examples_lib.pad(examples, self._shape(rows)[1])
      yield peft_trainer.TrainingInput(input_tokens=tokens, input_mask=learnt)

  def _last_loss(self) -> jax.Array:
    # The trainer keeps a step's metrics back until the next one has begun.
    return self.trainer._prev_buffered_train_metrics.losses[0]

  def _shape(self, rows: Rows) -> tuple[int, int]:
    """(examples, tokens of each) of a step's batch."""
    longest = max(len(self.examples[i].tokens) for row in rows for i in row)
    rounded = -(-longest // self.multiple) * self.multiple
    return sum(map(len, rows)), min(rounded, self.longest)

  def device_peak_bytes(self) -> int | None:
    """Most memory of the accelerator in use so far; None on a CPU."""
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else stats['peak_bytes_in_use']
