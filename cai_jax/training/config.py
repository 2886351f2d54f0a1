"""The settings of a training run."""

import dataclasses
import importlib.util
import math

from cai_jax.data import quality
from cai_jax.model.attention.kernels.kernel import AUTO, KERNELS
from cai_jax.model.config import ModelConfig
from cai_jax.model.lora import LoraConfig
from cai_jax.model.transformer import REMAT
from cai_jax.model.weight_files import DTYPES as STORED
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.settings import setting
from cai_jax.training.losses import LOSSES

SCHEDULES = ('constant', 'linear', 'cosine', 'wsd')
TARGETS = ('last', 'all', 'initial')
REASONING = ('drop', 'keep')
DTYPES = ('float32', 'bfloat16')

# Settings that do not affect the trained parameters, so a run may be resumed with other values.
MAY_CHANGE_ON_RESUME = ('log_every', 'checkpoint_every', 'keep', 'probes', 'wandb', 'export_dtype')

# Ranges of single settings. Every comparison with NaN is false, so NaN is refused.
_MINIMUM = {
  'epochs': 1,
  'batch_size': 1,
  'max_length': 2,
  'accumulation': 1,
  'log_every': 1,
  'checkpoint_every': 0,
  'keep': 1,
  'eval_every': 0,
  'patience': 0,
  'probes': 0,
  'weight_decay': 0,
  'clip_norm': 0,
  'lora_rank': 0,
  'balance_loss': 0,
}
_POSITIVE = ('learning_rate', 'eps')
_BELOW_ONE = ('helpfulness_share', 'b1', 'b2', 'warmup', 'decay', 'ema', 'eval_share')


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Settings of supervised training, checked on construction.

  Raises:
    UserError: if a value is not allowed, or two values contradict each other.
  """

  epochs: int = setting(1, 'Number of times that each example is seen.')
  batch_size: int = setting(
    32, 'Packed rows per optimizer step, over all devices and micro-batches.', most=100_000
  )
  max_length: int = setting(1024, 'Tokens per packed row. Longer examples are dropped and counted.')
  accumulation: int = setting(
    1, 'Micro-batches per step, computed one after the other. It must divide `batch_size`.'
  )
  loss: str = setting(
    'nll', "Name of a registered loss. 'nll' is the negative log-likelihood of the target tokens."
  )
  loss_normalization: str = setting(
    'sequence',
    "What the summed loss is divided by: 'sequence' is the number of sequences, as in the "
    "objective of Constitutional AI; 'token' is the number of target tokens.",
  )
  balance_loss: float = setting(
    0.0,
    'Factor of the load-balancing loss of a mixture of experts (Fedus et al. 2021), which is added '
    'to the loss. It is an average over all tokens and layers, so it does not depend on '
    '`loss_normalization`. With `accumulation` it costs a second forward pass. 0 disables it.',
    added=True,
  )
  target: str = setting(
    'last',
    "Which texts to learn: the 'last' revision, 'all' revisions (each one is an example), or the "
    "'initial' response (a control).",
  )
  helpfulness_share: float = setting(
    0.0, 'Share of the examples that are initial responses to helpfulness prompts, in [0, 1).'
  )
  drop_truncated: bool = setting(
    True, 'Whether to drop target texts that were cut at `max_tokens` when they were sampled.'
  )
  reasoning: str = setting(
    'drop',
    "What to do with the thoughts of a reasoning model: 'drop' learns the answer as the chat "
    "template renders it without thoughts, 'keep' learns thoughts and answer.",
    added=True,
  )
  filters: tuple[str, ...] = setting(
    (),
    'Defects that exclude a text, by their names in `feedback.max_rate`. A text is counted under '
    'the first defect that it has. Initial responses are not checked for defects that compare '
    'a revision with its response, critique or requests.',
  )
  learning_rate: float = setting(1e-5, 'Peak learning rate.')
  schedule: str = setting(
    'cosine',
    "Learning rate after the warm-up: 'constant', 'linear' or 'cosine' decay, or 'wsd' (warm-up, "
    'stable, decay; Hu et al. 2024), which is constant and then falls linearly.',
  )
  warmup: float = setting(
    0.05,
    'Share of all steps over which the learning rate rises linearly to its peak. It must leave at '
    'least one step.',
  )
  decay: float = setting(
    0.1, "Share of all steps, at the end, over which the learning rate of 'wsd' falls."
  )
  final_share: float = setting(
    0.0,
    "Share of the peak learning rate that 'linear', 'cosine' and 'wsd' fall to, in [0, 1]. They "
    'would reach it one step after the last.',
  )
  weight_decay: float = setting(
    0.0, 'Weight decay of AdamW. It does not apply to norms and biases.'
  )
  b1: float = setting(0.9, 'Decay rate of the first moment in AdamW.')
  b2: float = setting(0.95, 'Decay rate of the second moment in AdamW.')
  eps: float = setting(1e-8, 'Term added to the denominator in AdamW.')
  clip_norm: float = setting(
    1.0,
    'Global norm that gradients are clipped to, measured per target token whatever '
    '`loss_normalization` is. 0 disables clipping.',
  )
  ema: float = setting(
    0.0,
    'Decay of an exponential moving average of the parameters, which becomes the result of the '
    'training. 0 disables it.',
  )
  lora_rank: int = setting(
    0, 'Rank of low-rank adapters, which are trained instead of all parameters. 0 disables them.'
  )
  lora_alpha: float = setting(
    16.0, 'Scale of the adapters: their product is multiplied by `lora_alpha / lora_rank`.'
  )
  lora_modules: str = setting(
    'attention/|mlp/',
    'Regular expression that selects the linear layers to adapt. It is searched in paths such as '
    "'layers/0/attention/query'.",
  )
  remat: str = setting(
    'none',
    "What the backward pass recomputes to save memory: 'none'; 'dots', everything in a block "
    "except products with parameters; or 'full', whole blocks, which costs about a third more "
    'time.',
  )
  attention: str = setting(
    AUTO,
    "Attention implementation: 'blocks', 'xla', 'splash' (TPUs only) or 'cudnn' (NVIDIA GPUs "
    "only). 'auto' is the fastest one that can run when the training starts: 'splash' on TPUs if "
    "rows have a multiple of 128 tokens, 'cudnn' on NVIDIA GPUs in bfloat16 if it supports the "
    "heads, and else 'blocks'. The manifest records which one it is.",
  )
  deterministic: bool = setting(
    True,
    'Compile the train step so that it gives the same bits in every run on the same devices. Only '
    "GPUs need this. It has no effect with attention='cudnn', which XLA cannot compile so. With "
    "bfloat16 'auto' can mean 'cudnn'; for the same bits in every run, set attention='blocks'.",
    added=True,
  )
  dtype: str = setting(
    'float32',
    "Compute dtype, 'float32' or 'bfloat16'. Parameters and optimizer state are always float32.",
  )
  export_dtype: str = setting(
    'base',
    "Dtype of the saved model: 'float32', 'bfloat16' or 'float16'; 'base' is the dtype in which "
    'the files of the initial model hold its embedding.',
    added=True,
  )
  seed: int = setting(
    0, 'Seed for the order of the examples, the held-out split and the initial adapters.'
  )
  eval_share: float = setting(
    0.0, 'Share of the prompts whose examples are held out to measure the loss, in [0, 1).'
  )
  eval_every: int = setting(
    0, 'Steps between evaluations on the held-out examples. 0 evaluates only at the end.'
  )
  patience: int = setting(
    0,
    'Number of evaluations in a row without a new lowest held-out loss after which training stops. '
    'The result is then the step with the lowest loss. 0 disables early stopping.',
  )
  probes: int = setting(0, 'Number of held-out prompts to answer at each evaluation.')
  log_every: int = setting(1, 'Steps between rows of `metrics.jsonl`.')
  checkpoint_every: int = setting(100, 'Steps between checkpoints. 0 saves only at the end.')
  keep: int = setting(
    2, 'Number of latest checkpoints to keep. With `patience`, the best one is kept as well.'
  )
  wandb: str = setting(
    '', "Weights & Biases project that also receives the metrics. '' disables it."
  )

  def __post_init__(self):
    self._check_names()
    self._check_numbers()
    self._check_combinations()
    _ = self.lora  # checked on construction
    if self.wandb and not _is_installed('wandb'):
      raise UserError(
        f'train.wandb={self.wandb!r} needs the package wandb, which is not installed. Run '
        "`pip install wandb`, or set train.wandb=''."
      )

  def _check_names(self) -> None:
    for name, allowed in (
      ('loss_normalization', LOSSES[self.loss].normalizations),
      ('target', TARGETS),
      ('reasoning', REASONING),
      ('schedule', SCHEDULES),
      ('dtype', DTYPES),
      ('export_dtype', ('base', *STORED)),
      ('remat', REMAT),
      ('attention', (AUTO, *KERNELS)),
    ):
      value = getattr(self, name)
      if value not in allowed:
        raise UserError(f'train.{name}={value!r} is not one of {tuple(allowed)}.')
    names = tuple(name for name in quality.FLAGS if name not in quality.NEEDS_SCORES)
    unknown = [name for name in self.filters if name not in (*names, *quality.RENAMED)]
    if unknown or isinstance(self.filters, str):
      raise UserError(f'train.filters={self.filters!r} must be a tuple of names from {names}.')

  def _check_numbers(self) -> None:
    for name, minimum in _MINIMUM.items():
      if not getattr(self, name) >= minimum:
        raise UserError(f'train.{name}={getattr(self, name)} must be at least {minimum}.')
    for name in _POSITIVE:
      if not 0 < getattr(self, name) < math.inf:
        raise UserError(f'train.{name}={getattr(self, name)} must be a positive number.')
    for name in _BELOW_ONE:
      if not 0 <= getattr(self, name) < 1:
        raise UserError(f'train.{name}={getattr(self, name)} must be in [0, 1).')
    if not 0 <= self.final_share <= 1:
      raise UserError(f'train.final_share={self.final_share} must be in [0, 1].')

  def _check_combinations(self) -> None:
    if self.schedule == 'wsd' and self.warmup + self.decay > 1:
      raise UserError(
        f'train.warmup={self.warmup} and train.decay={self.decay} are shares of the same steps and '
        'add up to more than 1. Lower one of them.'
      )
    if (self.eval_every or self.patience) and not self.eval_share:
      raise UserError(
        f'train.eval_every={self.eval_every} and train.patience={self.patience} need held-out '
        'examples. Set train.eval_share, for example to 0.02.'
      )
    if self.patience and not self.eval_every:
      raise UserError(
        f'train.patience={self.patience} counts evaluations. Set train.eval_every as well.'
      )
    if self.balance_loss and not LOSSES[self.loss].routes:
      routing = [name for name in LOSSES if LOSSES[name].routes]
      raise UserError(
        f'train.balance_loss={self.balance_loss} needs a loss that returns how experts were used, '
        f'which train.loss={self.loss!r} does not. Set it to 0, or train.loss to one of {routing}.'
      )
    if self.batch_size % self.accumulation:
      raise UserError(
        f'train.batch_size={self.batch_size} must be a multiple of '
        f'train.accumulation={self.accumulation}.'
      )

  def check_model(self, model: ModelConfig, name: str = 'The model') -> None:
    """Check that the settings suit the model that is trained.

    Args:
      model: its shape.
      name: its name, for the message.

    Raises:
      UserError: if there is a load-balancing loss, but no mixture of experts.
    """
    if self.balance_loss and model.experts is None:
      raise UserError(
        f'train.balance_loss={self.balance_loss} is for mixtures of experts, but {name} has no '
        'experts. Set it to 0.'
      )

  @property
  def lora(self) -> LoraConfig | None:
    """The adapters to train, or None if all parameters are trained."""
    if not self.lora_rank:
      return None
    try:
      return LoraConfig(self.lora_rank, self.lora_alpha, self.lora_modules)
    except UserError as error:
      raise UserError(f'train.lora_*: {str(error).removeprefix("lora: ")}') from None


def _is_installed(package: str) -> bool:
  """Whether a package can be imported; a folder of that name without code does not count."""
  spec = importlib.util.find_spec(package)
  return spec is not None and spec.origin is not None
