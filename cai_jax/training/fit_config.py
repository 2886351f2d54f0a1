"""The settings that every kind of training shares."""

import dataclasses
import importlib.util
import math
from typing import Any, ClassVar

from cai_jax.model import peft
from cai_jax.model.attention.kernels.kernel import AUTO, KERNELS
from cai_jax.model.config import ModelConfig
from cai_jax.model.lora import LoraConfig
from cai_jax.model.quantized.kernel import FULL, check_format
from cai_jax.model.quantized_params import check_weights
from cai_jax.model.stacks import LAYOUTS
from cai_jax.model.transformer import REMAT
from cai_jax.model.weight_files import DTYPES as STORED
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.settings import build_options, setting
from cai_jax.training.losses import LOSSES, Loss

SCHEDULES = ('constant', 'linear', 'cosine', 'wsd')
DTYPES = ('float32', 'bfloat16')

# Settings that do not affect the trained parameters, so a run may be resumed with other values.
# 'layers' affects their rounding, as the mesh does.
MAY_CHANGE_ON_RESUME = (
  *('log_every', 'checkpoint_every', 'keep', 'probes', 'wandb', 'export_dtype', 'lora_export'),
  'layers',
)

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
_BELOW_ONE = ('b1', 'b2', 'warmup', 'decay', 'ema', 'eval_share')


@dataclasses.dataclass(frozen=True)
class FitConfig:
  """Settings of `loop.fit`, checked on construction. `TrainConfig` and `PreferConfig` extend them.

  A subclass names its section of the config, which messages show, and says what it trains:
  `loss_field`, `kinds`, `loss_options` and `weight_name`.

  Raises:
    UserError: if a value is not allowed, or two values contradict each other.
  """

  section: ClassVar[str]
  loss_field: ClassVar[str]  # the field that names the loss
  kinds: ClassVar[tuple[str, ...]]  # the kinds of units that it may train on
  # Whether `clip_norm` is the norm of the gradient per target token, or per unit of the loss.
  clips_per_token: ClassVar[bool] = True
  # Fields that a resumed run may have other values of.
  may_change: ClassVar[tuple[str, ...]] = MAY_CHANGE_ON_RESUME

  epochs: int = setting(1, 'Number of times that each example is seen.')
  batch_size: int = setting(
    32, 'Packed rows per optimizer step, over all devices and micro-batches.', most=100_000
  )
  max_length: int = setting(1024, 'Tokens per packed row. Longer examples are dropped and counted.')
  accumulation: int = setting(
    1, 'Micro-batches per step, computed one after the other. It must divide `batch_size`.'
  )
  balance_loss: float = setting(
    0.0,
    'Factor of the load-balancing loss of a mixture of experts (Fedus et al. 2021), which is added '
    'to the loss. It is an average over all tokens and layers, whatever the loss is divided by. '
    'With `accumulation` it costs a second forward pass. 0 disables it.',
    added=True,
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
  base_weights: str = setting(
    FULL,
    "Format of the frozen linear layers under the adapters, which need `lora_rank`: 'full' is the "
    "compute dtype, 'int8' has 8 bits a weight with a scale for each output channel, and 'nf4' is "
    'the 4-bit format of QLoRA. The saved model is the quantized one with the adapters added.',
    added=True,
  )
  lora_init: str = setting(
    '',
    "Folder of an adapter in PEFT's format from which training starts. Its rank, its scale and its "
    "layers must be those of `lora_rank`, `lora_alpha` and `lora_modules`. '' draws new adapters.",
    path=True,
    added=True,
  )
  lora_export: bool = setting(
    False,
    "Whether to save the trained adapters in PEFT's format as well, as adapter/ beside the "
    'checkpoints of the training.',
    added=True,
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
    "heads and rows have at most 8,192 tokens, and else 'blocks'. The manifest records which one "
    'it is.',
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
  layers: str = setting(
    'unrolled',
    "How the train step contains the layers: 'unrolled' or 'scan', see `model.layers`.",
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
    self._check_adapters()
    _ = self.loss_settings  # checked on construction
    if self.wandb and not _is_installed('wandb'):
      raise UserError(
        f'{self.section}.wandb={self.wandb!r} needs the package wandb, which is not installed. Run '
        f"`pip install wandb`, or set {self.section}.wandb=''."
      )

  @classmethod
  def losses(cls) -> list[str]:
    """Return the names of the losses that may be trained."""
    return [name for name in LOSSES if LOSSES[name].units in cls.kinds]

  @property
  def loss_name(self) -> str:
    """Name of the registered loss."""
    return getattr(self, self.loss_field)

  @property
  def loss_options(self) -> tuple[tuple[str, Any], ...]:
    """(name, value) pairs for the settings of the loss."""
    return ()

  @property
  def weight_name(self) -> str:
    """Name of the sum that the loss is divided by."""
    raise NotImplementedError

  @property
  def shares_tokens(self) -> bool:
    """Whether the segments of a unit share the tokens of their prompt."""
    return False

  @property
  def registered_loss(self) -> Loss:
    """The loss that is trained."""
    return LOSSES[self.loss_name]

  @property
  def loss_settings(self) -> Any:
    """The settings of the loss as its own dataclass, or None if it has none."""
    owner = f'The loss {self.loss_name!r}'
    try:
      return build_options(self.registered_loss.settings, self.loss_options, 'options', owner)
    except UserError as error:  # of the loss, which does not know the section: "options: …"
      raise UserError(f'{self.section}.{error}') from None

  @property
  def needed_values(self) -> tuple[str, ...]:
    """Names of the units' values that the loss reads, apart from 'reference'."""
    return self.registered_loss.needed_values(self.loss_settings)

  @property
  def lora(self) -> LoraConfig | None:
    """The adapters to train, or None if all parameters are trained."""
    if not self.lora_rank:
      return None
    try:
      return LoraConfig(self.lora_rank, self.lora_alpha, self.lora_modules)
    except UserError as error:
      raise UserError(f'{self.section}.lora_*: {str(error).removeprefix("lora: ")}') from None

  def check_model(self, model: ModelConfig, name: str = 'The model') -> None:
    """Check that the settings suit the model that is trained.

    Args:
      model: its shape.
      name: its name, for the message.

    Raises:
      UserError: if there is a load-balancing loss, but no mixture of experts; if the model cannot
        be quantized; or if its adapters have no form in PEFT, or are not those of `lora_init`.
    """
    check_weights(model, self.base_weights, f'{self.section}.base_weights')
    if self.lora is not None and self.lora_export:
      peft.check_export(model, self.lora, self.section)
    if self.lora is not None and self.lora_init:
      peft.read_adapters(self.lora_init, model, self.lora, self.section)
    if self.balance_loss and model.experts is None:
      raise UserError(
        f'{self.section}.balance_loss={self.balance_loss} is for mixtures of experts, but {name} '
        'has no experts. Set it to 0.'
      )

  def _choices(self) -> dict[str, Any]:
    """Return the allowed values of each setting that is a name."""
    return {
      'schedule': SCHEDULES,
      'dtype': DTYPES,
      'export_dtype': ('base', *STORED),
      'remat': REMAT,
      'layers': LAYOUTS,
      'attention': (AUTO, *KERNELS),
    }

  def _check_names(self) -> None:
    if self.registered_loss.units not in self.kinds:
      raise UserError(
        f'{self.section}.{self.loss_field}={self.loss_name!r} trains on units of the kind '
        f'{self.registered_loss.units!r}. Here it must be one of {self.losses()}.'
      )
    for name, allowed in self._choices().items():
      value = getattr(self, name)
      if value not in allowed:
        raise UserError(f'{self.section}.{name}={value!r} is not one of {tuple(allowed)}.')

  def _check_numbers(self) -> None:
    def check(name: str, is_valid: bool, allowed: str) -> None:
      if not is_valid:
        raise UserError(f'{self.section}.{name}={getattr(self, name)} must be {allowed}.')

    for name, minimum in _MINIMUM.items():
      check(name, getattr(self, name) >= minimum, f'at least {minimum}')
    for name in _POSITIVE:
      check(name, 0 < getattr(self, name) < math.inf, 'a positive number')
    for name in _BELOW_ONE:
      check(name, 0 <= getattr(self, name) < 1, 'in [0, 1)')
    check('final_share', 0 <= self.final_share <= 1, 'in [0, 1]')

  def _check_combinations(self) -> None:
    section = self.section
    if self.schedule == 'wsd' and self.warmup + self.decay > 1:
      raise UserError(
        f'{section}.warmup={self.warmup} and {section}.decay={self.decay} are shares of the same '
        'steps and add up to more than 1. Lower one of them.'
      )
    if (self.eval_every or self.patience) and not self.eval_share:
      raise UserError(
        f'{section}.eval_every={self.eval_every} and {section}.patience={self.patience} need '
        f'held-out examples. Set {section}.eval_share, for example to 0.02.'
      )
    if self.patience and not self.eval_every:
      raise UserError(
        f'{section}.patience={self.patience} counts evaluations. Set {section}.eval_every as well.'
      )
    if self.balance_loss and not self.registered_loss.routes:
      field = f'{section}.{self.loss_field}'
      routing = [name for name in self.losses() if LOSSES[name].routes]
      raise UserError(
        f'{section}.balance_loss={self.balance_loss} needs a loss that returns how experts were '
        f'used, which {field}={self.loss_name!r} does not. Set it to 0, or {field} to one of '
        f'{routing}.'
      )
    if self.batch_size % self.accumulation:
      raise UserError(
        f'{section}.batch_size={self.batch_size} must be a multiple of '
        f'{section}.accumulation={self.accumulation}.'
      )

  def _check_adapters(self) -> None:
    """Check the settings of adapters."""
    adapters = self.lora  # checked on construction
    check_format(self.base_weights, f'{self.section}.base_weights')
    for name in ('base_weights', 'lora_init', 'lora_export'):
      field = f'{self.section}.{name}={getattr(self, name)!r}'
      if getattr(self, name) in ('', False, FULL):
        continue
      if adapters is None:
        raise UserError(
          f'{field} has no effect without adapters. Set {self.section}.lora_rank, or leave it out.'
        )
      if self.registered_loss.head is not None:
        raise UserError(
          f'{field} is for language models, and {self.section}.{self.loss_field}='
          f'{self.loss_name!r} trains a reward model. Leave it out.'
        )


def _is_installed(package: str) -> bool:
  """Whether a package can be imported; a folder of that name without code does not count."""
  spec = importlib.util.find_spec(package)
  return spec is not None and spec.origin is not None
