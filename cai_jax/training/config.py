"""What a training run is set to."""

import dataclasses
import math

from cai_jax.training.objective import WEIGHTS

SCHEDULES = ('constant', 'linear', 'cosine')
TARGETS = ('last', 'all', 'initial')
FREE = ('log_every', 'checkpoint_every', 'keep')  # what a run may change on its way


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Settings of supervised training, checked when made.

  Attributes:
    epochs: times that every example is seen.
    batch_size: packed rows of an optimizer step, over all devices and micro-batches.
    max_length: tokens of a row; a longer example is dropped and counted.
    accumulation: micro-batches that a step is computed in, one after the other.
    loss_normalization: 'sequence' divides the summed loss by the number of sequences (the
      method's objective), 'token' by the number of target tokens.
    target: 'last' revision, 'all' revisions (each an example), or 'initial' answer (a control).
    helpfulness_share: share of the examples that are initial answers to helpfulness prompts.
    drop_truncated: leave out texts that the length limit cut.
    learning_rate: peak of the schedule.
    schedule: 'constant', 'linear' or 'cosine' after the warm-up.
    warmup: share of all steps over which the learning rate rises from 0.
    final_share: share of the peak that 'linear' and 'cosine' end at.
    weight_decay, b1, b2, eps: of AdamW; norms and biases are not decayed.
    clip_norm: largest global norm of a gradient; 0 leaves it as it is.
    remat: compute each block again in the backward pass instead of keeping its activations: less
      memory, about a third more work.
    dtype: compute dtype, 'float32' or 'bfloat16'; parameters and optimizer state are f32.
    seed: of the order of the examples.
    log_every: steps between rows of metrics.jsonl.
    checkpoint_every: steps between checkpoints; 0 keeps the last step only.
    keep: checkpoints kept.
  """

  epochs: int = 1
  batch_size: int = 32
  max_length: int = 1024
  accumulation: int = 1
  loss_normalization: str = 'sequence'
  target: str = 'last'
  helpfulness_share: float = 0.0
  drop_truncated: bool = True
  learning_rate: float = 1e-5
  schedule: str = 'cosine'
  warmup: float = 0.05
  final_share: float = 0.0
  weight_decay: float = 0.0
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  clip_norm: float = 1.0
  remat: bool = False
  dtype: str = 'float32'
  seed: int = 0
  log_every: int = 1
  checkpoint_every: int = 100
  keep: int = 2

  def __post_init__(self):
    for name, allowed in (
      ('loss_normalization', tuple(WEIGHTS)),
      ('target', TARGETS),
      ('schedule', SCHEDULES),
      ('dtype', ('float32', 'bfloat16')),
    ):
      if getattr(self, name) not in allowed:
        raise ValueError(f'train.{name}={getattr(self, name)!r} is not one of {allowed}.')
    for name, low in (
      ('epochs', 1),
      ('batch_size', 1),
      ('max_length', 2),
      ('accumulation', 1),
      ('log_every', 1),
      ('checkpoint_every', 0),
      ('keep', 1),
      ('weight_decay', 0),
      ('clip_norm', 0),
    ):
      if not getattr(self, name) >= low:  # NaN too
        raise ValueError(f'train.{name}={getattr(self, name)} is too small: at least {low}.')
    for name in ('learning_rate', 'eps'):
      if not 0 < getattr(self, name) < math.inf:
        raise ValueError(f'train.{name}={getattr(self, name)} must be a positive number.')
    for name, high in (('helpfulness_share', 1), ('b1', 1), ('b2', 1), ('warmup', 1)):
      if not 0 <= getattr(self, name) < high:
        raise ValueError(f'train.{name}={getattr(self, name)} is not in [0, {high}).')
    if not 0 <= self.final_share <= 1:
      raise ValueError(f'train.final_share={self.final_share} is not in [0, 1].')
    if self.batch_size % self.accumulation:
      raise ValueError(
        f'train.batch_size={self.batch_size} rows cannot be split into '
        f'train.accumulation={self.accumulation} micro-batches: use a multiple of it.'
      )
