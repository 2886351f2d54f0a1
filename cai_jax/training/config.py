"""The settings of supervised training."""

import dataclasses
from typing import Any, ClassVar

from cai_jax.data import quality
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.settings import setting
from cai_jax.training.fit_config import FitConfig

TARGETS = ('last', 'all', 'initial')
REASONING = ('drop', 'keep')


@dataclasses.dataclass(frozen=True)
class TrainConfig(FitConfig):
  """Settings of supervised training, checked on construction.

  Raises:
    UserError: if a value is not allowed, or two values contradict each other.
  """

  section: ClassVar[str] = 'train'
  loss_field: ClassVar[str] = 'loss'
  kinds: ClassVar[tuple[str, ...]] = ('sequence',)

  loss: str = setting(
    'nll', "Name of a registered loss. 'nll' is the negative log-likelihood of the target tokens."
  )
  loss_normalization: str = setting(
    'sequence',
    "What the summed loss is divided by: 'sequence' is the number of sequences, as in the "
    "objective of Constitutional AI; 'token' is the number of target tokens.",
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

  def __post_init__(self):
    super().__post_init__()
    names = tuple(name for name in quality.FLAGS if name not in quality.NEEDS_SCORES)
    unknown = [name for name in self.filters if name not in (*names, *quality.RENAMED)]
    if unknown or isinstance(self.filters, str):
      raise UserError(f'train.filters={self.filters!r} must be a tuple of names from {names}.')
    if not 0 <= self.helpfulness_share < 1:
      raise UserError(f'train.helpfulness_share={self.helpfulness_share} must be in [0, 1).')

  @property
  def weight_name(self) -> str:
    """Name of the sum that the loss is divided by."""
    return self.registered_loss.normalizations[self.loss_normalization]

  def _choices(self) -> dict[str, Any]:
    """Return the allowed values of each setting that is a name."""
    return {
      'loss_normalization': self.registered_loss.normalizations,
      'target': TARGETS,
      'reasoning': REASONING,
      **super()._choices(),
    }
