"""The settings of training on preferences."""

import dataclasses
from typing import Any, ClassVar

from cai_jax.model.config import ModelConfig
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.settings import setting
from cai_jax.training.fit_config import MAY_CHANGE_ON_RESUME, FitConfig
from cai_jax.training.losses import LOSSES


@dataclasses.dataclass(frozen=True)
class PreferConfig(FitConfig):
  """Settings of training on preferences, checked on construction.

  Raises:
    UserError: if a value is not allowed, or two values contradict each other.
  """

  section: ClassVar[str] = 'prefer'
  loss_field: ClassVar[str] = 'objective'
  kinds: ClassVar[tuple[str, ...]] = ('comparison', 'judged')
  clips_per_token: ClassVar[bool] = False
  # Fingerprints of the models, not their names, say whether they are the same.
  may_change: ClassVar[tuple[str, ...]] = (*MAY_CHANGE_ON_RESUME, 'init', 'reference')

  max_length: int = setting(
    2048,
    'Tokens per packed row. Both sides of a comparison, each with the prompt, stand in one row; '
    'longer comparisons are dropped and counted.',
  )
  learning_rate: float = setting(1e-6, 'Peak learning rate.')
  clip_norm: float = setting(
    1.0,
    'Global norm that gradients of the loss, which is a mean over comparisons, are clipped to. '
    '0 disables clipping.',
  )
  objective: str = setting(
    'dpo',
    "What is trained: 'dpo', 'robust_dpo', 'ipo', 'orpo' or 'simpo' on comparisons; 'kto' on "
    "judged responses; 'reward' for a reward model; or another registered loss over either.",
  )
  options: tuple[tuple[str, Any], ...] = setting(
    (),
    "(name, value) pairs for the objective, such as (('beta', 0.1),). docs/preferences.md lists "
    'the options of each objective.',
  )
  init: str = setting(
    'aligned',
    "Model that training starts from: 'aligned' is M_aligned of this run, 'base' is M_θ; else a "
    'checkpoint folder or a hub name.',
    path=True,
  )
  reference: str = setting(
    '',
    'Reference of objectives that have one, with the same tokenizer: a checkpoint folder or a hub '
    "name. '' is the model that training starts from.",
    path=True,
  )
  drop_truncated: bool = setting(
    True, 'Whether to drop comparisons with a response that was cut at `max_tokens`.'
  )
  share_prompts: bool = setting(
    False,
    'Whether both sides of a comparison share one copy of their prompt, which is computed once '
    '(Wang and Hegde 2024). The loss of a comparison is the same up to rounding. A row holds more '
    'comparisons, so an epoch has fewer steps of the same `batch_size`.',
    added=True,
  )

  def __post_init__(self):
    super().__post_init__()
    if self.share_prompts and not self.registered_loss.shares:
      fitting = [name for name in self.losses() if LOSSES[name].shares]
      raise UserError(
        f'{self.section}.share_prompts=True needs an objective that supports it, which '
        f'{self.objective!r} does not. Set it to False, or choose one of {fitting}.'
      )

  def check_model(self, model: ModelConfig, name: str = 'The model') -> None:
    """Check that the settings suit the model that is trained; see `FitConfig.check_model`.

    Raises:
      UserError: also if prompts are shared, but the model has a state that cannot branch.
    """
    super().check_model(model, name)
    if self.share_prompts and model.delta is not None:
      raise UserError(
        f'{self.section}.share_prompts=True is not possible: {name} has layers with a state, which '
        'two responses cannot continue from one prompt. Set it to False.'
      )

  @property
  def shares_tokens(self) -> bool:
    """Whether the segments of a unit share the tokens of their prompt."""
    return self.share_prompts

  @property
  def loss_options(self) -> tuple[tuple[str, Any], ...]:
    """(name, value) pairs for the settings of the loss."""
    return self.options

  @property
  def weight_name(self) -> str:
    """Name of the sum that the loss is divided by."""
    return next(iter(self.registered_loss.normalizations.values()))
