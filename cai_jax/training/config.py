"""What a training run is set to."""

import dataclasses
import importlib.util
import math

from cai_jax.data import quality
from cai_jax.model.attention.kernels.kernel import KERNELS
from cai_jax.model.lora import LoraConfig
from cai_jax.model.transformer import REMAT
from cai_jax.runtime.errors import UserError
from cai_jax.training.objective import WEIGHTS

SCHEDULES = ('constant', 'linear', 'cosine', 'wsd')
TARGETS = ('last', 'all', 'initial')
FREE = ('log_every', 'checkpoint_every', 'keep', 'probes', 'wandb')  # what may change on the way


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
    filters: names of `quality.FLAGS`; a text with any of these is left out, and counted under the
      first. An initial answer has none that compares with a response, critique or request.
    learning_rate: peak of the schedule.
    schedule: after the warm-up 'constant', 'linear', 'cosine', or 'wsd': constant, then linear
      (warm-up, stable, decay; Hu et al. 2024).
    warmup: share of all steps over which the learning rate rises from 0.
    decay: share of all steps over which 'wsd' falls.
    final_share: share of the peak that 'linear', 'cosine' and 'wsd' end at.
    weight_decay, b1, b2, eps: of AdamW; norms and biases are not decayed.
    clip_norm: largest global norm of a gradient; 0 leaves it as it is.
    ema: decay of an exponential moving average of the parameters, which then is the result;
      0 keeps none.
    lora_rank: of low-rank adapters, which are then all that is trained; 0 trains all parameters.
    lora_alpha, lora_modules: as `alpha` and `modules` of `model.lora.LoraConfig`.
    remat: what the backward pass computes again instead of keeping it. 'none'; 'dots': all of a
      block but products with parameters; 'full': all of a block, a third more work.
    attention: 'blocks', 'xla', 'splash' (TPUs) or 'cudnn' (NVIDIA GPUs); see `model.kernels`.
    dtype: compute dtype, 'float32' or 'bfloat16'; parameters and optimizer state are f32.
    seed: of the order of the examples.
    eval_share: share of the examples that are held out, for the loss on them.
    eval_every: steps between evaluations on these; 0 evaluates at the end only.
    patience: evaluations without a lower held-out loss after which training stops; 0 never does.
    probes: held-out prompts that are answered at each evaluation.
    log_every: steps between rows of metrics.jsonl.
    checkpoint_every: steps between checkpoints; 0 keeps the last step only.
    keep: checkpoints kept.
    wandb: project of Weights & Biases that gets the metrics too; '' is none.
  """

  epochs: int = 1
  batch_size: int = 32
  max_length: int = 1024
  accumulation: int = 1
  loss_normalization: str = 'sequence'
  target: str = 'last'
  helpfulness_share: float = 0.0
  drop_truncated: bool = True
  filters: tuple[str, ...] = ()
  learning_rate: float = 1e-5
  schedule: str = 'cosine'
  warmup: float = 0.05
  decay: float = 0.1
  final_share: float = 0.0
  weight_decay: float = 0.0
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  clip_norm: float = 1.0
  ema: float = 0.0
  lora_rank: int = 0
  lora_alpha: float = 16.0
  lora_modules: str = 'attention/|mlp/'
  remat: str = 'none'
  attention: str = 'blocks'
  dtype: str = 'float32'
  seed: int = 0
  eval_share: float = 0.0
  eval_every: int = 0
  patience: int = 0
  probes: int = 0
  log_every: int = 1
  checkpoint_every: int = 100
  keep: int = 2
  wandb: str = ''

  def __post_init__(self):
    for name, allowed in (
      ('loss_normalization', tuple(WEIGHTS)),
      ('target', TARGETS),
      ('schedule', SCHEDULES),
      ('dtype', ('float32', 'bfloat16')),
      ('remat', tuple(REMAT)),
      ('attention', tuple(KERNELS)),
    ):
      if getattr(self, name) not in allowed:
        raise UserError(f'train.{name}={getattr(self, name)!r} is not one of {allowed}.')
    unknown = [name for name in self.filters if name not in quality.FLAGS]
    if unknown or isinstance(self.filters, str):
      raise UserError(
        f'train.filters={self.filters!r} must be a tuple of names of {tuple(quality.FLAGS)}.'
      )
    for name, low in (
      ('epochs', 1),
      ('batch_size', 1),
      ('max_length', 2),
      ('accumulation', 1),
      ('log_every', 1),
      ('checkpoint_every', 0),
      ('keep', 1),
      ('eval_every', 0),
      ('patience', 0),
      ('probes', 0),
      ('weight_decay', 0),
      ('clip_norm', 0),
    ):
      if not getattr(self, name) >= low:  # NaN too
        raise UserError(f'train.{name}={getattr(self, name)} is too small: at least {low}.')
    for name in ('learning_rate', 'eps'):
      if not 0 < getattr(self, name) < math.inf:
        raise UserError(f'train.{name}={getattr(self, name)} must be a positive number.')
    for name in ('helpfulness_share', 'b1', 'b2', 'warmup', 'decay', 'ema', 'eval_share'):
      if not 0 <= getattr(self, name) < 1:
        raise UserError(f'train.{name}={getattr(self, name)} is not in [0, 1).')
    if self.schedule == 'wsd' and self.warmup + self.decay > 1:
      raise UserError(
        f'train.warmup={self.warmup} and train.decay={self.decay} are over 1 together: they are '
        'shares of the same steps.'
      )
    if (self.eval_every or self.patience) and not self.eval_share:
      raise UserError(
        f'train.eval_every={self.eval_every} and train.patience={self.patience} need examples that '
        'are held out: set train.eval_share, such as 0.02.'
      )
    if self.patience and not self.eval_every:
      raise UserError(f'train.patience={self.patience} counts evaluations: set train.eval_every.')
    if self.lora_rank < 0:
      raise UserError(f'train.lora_rank={self.lora_rank} is too small: at least 0.')
    _ = self.lora  # checked when made
    if self.wandb and not _installed('wandb'):
      raise UserError(
        f'train.wandb={self.wandb!r} sends metrics to Weights & Biases, whose package is not '
        "installed: pip install wandb, or set train.wandb=''."
      )
    if not 0 <= self.final_share <= 1:
      raise UserError(f'train.final_share={self.final_share} is not in [0, 1].')
    if self.batch_size % self.accumulation:
      raise UserError(
        f'train.batch_size={self.batch_size} rows cannot be split into '
        f'train.accumulation={self.accumulation} micro-batches: use a multiple of it.'
      )

  @property
  def lora(self) -> LoraConfig | None:
    """The adapters that are trained; None if all parameters are."""
    if not self.lora_rank:
      return None
    try:
      return LoraConfig(self.lora_rank, self.lora_alpha, self.lora_modules)
    except ValueError as error:
      raise UserError(f'train.lora_*: {str(error).removeprefix("lora: ")}') from None


def _installed(package: str) -> bool:
  """Whether a package can be imported. A mere folder of its name, such as its logs', is none."""
  spec = importlib.util.find_spec(package)
  return spec is not None and spec.origin is not None
