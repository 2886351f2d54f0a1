"""The sections `prefer` and `reward` of a config: training on preferences within a run."""

import dataclasses
from typing import ClassVar

from cai_jax.data.preferences import FORMS
from cai_jax.data.preferences.reading import FILTERS
from cai_jax.pipeline.pair_sources import PAIR_SOURCES
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.settings import setting
from cai_jax.training.losses import LOSSES
from cai_jax.training.prefer_config import PreferConfig

ROLES = ('base', 'aligned', 'init')  # models of a run from which a policy can be trained
_FORM = (
  f'Form of the file in `data`: one of {tuple(FORMS)}, or one that a plugin registers. '
  'docs/preferences.md describes them.'
)
_DATA = (
  "'implied' (the last revision of D_CAI over the initial response), 'rounds' (each round over the "
  "one before), 'every_pair' (each later response over each earlier one), 'labels' (what stage "
  'label writes), or a file in one of the forms of docs/preferences.md.'
)
_FILTERS = f'Leave out comparisons whose better response has one of these defects: {FILTERS}.'
_INVALID = (
  "What a row of the file in `data` does that cannot be read: 'error' ends the run before it "
  "starts, and 'skip' leaves it out and counts it."
)
_SHUFFLE = (
  'Whether to exchange the two sides of each comparison with probability 0.5: a control, which '
  'must not help.'
)


def _check_data(config: 'PolicyConfig | RewardConfig', head: str | None, what: str) -> None:
  """Check the fields that both sections have, and that the objective trains the right thing."""
  section = config.section
  if config.form not in FORMS:
    raise UserError(f'{section}.form={config.form!r} is not one of {tuple(FORMS)}.')
  names_file = bool(config.data) and config.data not in PAIR_SOURCES
  for name, default in (('form', 'trl'), ('invalid', 'error')):
    if (value := getattr(config, name)) != default and not names_file:
      raise UserError(
        f'{section}.{name}={value!r} has no effect, because {section}.data={config.data!r} names '
        'no file. Set both, or leave both out.'
      )
  if config.invalid not in ('error', 'skip'):
    raise UserError(f"{section}.invalid={config.invalid!r} must be 'error' or 'skip'.")
  _check_filters(config)
  if config.registered_loss.head != head:
    fitting = [
      name for name, loss in LOSSES.items() if loss.head == head and loss.units != 'sequence'
    ]
    raise UserError(
      f'{section}.objective={config.objective!r} does not train {what}. Choose one of {fitting}.'
    )
  if config.reference and not config.registered_loss.needs_reference:
    raise UserError(
      f'{section}.reference={config.reference!r} has no effect, because {section}.objective='
      f'{config.objective!r} has no reference model. Leave {section}.reference out.'
    )
  if config.shuffle and not config.data:
    raise UserError(
      f'{section}.shuffle=True has no effect, because {section}.data is empty. Name comparisons in '
      f'{section}.data, or leave out {section}.shuffle.'
    )


def _check_filters(config: 'PolicyConfig | RewardConfig') -> None:
  """Check the names of the filters, and that there is something to filter."""
  section = config.section
  if isinstance(config.filters, str) or not {*config.filters} <= {*FILTERS}:
    raise UserError(
      f'{section}.filters={config.filters!r} must be a tuple of names from {FILTERS}.'
    )
  if config.filters and not config.data:
    raise UserError(
      f'{section}.filters={config.filters!r} has no effect, because {section}.data is empty. Name '
      f'comparisons in {section}.data, or leave out {section}.filters.'
    )


@dataclasses.dataclass(frozen=True)
class PolicyConfig(PreferConfig):
  """How a run trains policies on preferences.

  Raises:
    UserError: if a value is not allowed, or two values contradict each other.
  """

  data: str = setting('', f"Comparisons that policies learn: {_DATA} '' trains none.", path=True)
  form: str = setting('trl', _FORM)
  filters: tuple[str, ...] = setting((), _FILTERS, added=True)
  invalid: str = setting('error', _INVALID, added=True)
  shuffle: bool = setting(False, _SHUFFLE)
  compare: tuple[str, ...] = setting(
    (),
    'Further models from which a policy is trained in the same way, to compare: names from '
    f"{ROLES}, which are M_θ, M_aligned and the model that fine-tuning starts from. ('base',) "
    'shows what the objective does without fine-tuning.',
  )

  def __post_init__(self):
    super().__post_init__()
    _check_data(self, None, 'a language model')
    names = self.compare
    if isinstance(names, str) or len({*names, self.init}) <= len(names) or not {*names} <= {*ROLES}:
      raise UserError(
        f'prefer.compare={names!r} must be a tuple of different names from {ROLES}, without '
        f'prefer.init={self.init!r}. Correct the names.'
      )
    if names and not self.data:
      raise UserError(
        f'prefer.compare={names!r} has no effect, because prefer.data is empty. Name comparisons '
        'in prefer.data, or leave out prefer.compare.'
      )


@dataclasses.dataclass(frozen=True)
class RewardConfig(PreferConfig):
  """How a run trains its reward model.

  Raises:
    UserError: if a value is not allowed, or two values contradict each other.
  """

  section: ClassVar[str] = 'reward'

  objective: str = setting(
    'reward', "What is trained: 'reward', or another registered loss that trains a score."
  )
  data: str = setting(
    '', f"Comparisons that the reward model learns: {_DATA} '' trains none.", path=True
  )
  form: str = setting('trl', _FORM)
  filters: tuple[str, ...] = setting((), _FILTERS, added=True)
  invalid: str = setting('error', _INVALID, added=True)
  shuffle: bool = setting(False, _SHUFFLE)
  best_of_n: int = setting(
    0,
    'Number of answers of M_θ to each training prompt, of which the one with the highest reward is '
    'kept in best_of_n/, as a D_CAI to fine-tune on (rejection sampling). 0 samples none.',
    most=10_000,
  )

  def __post_init__(self):
    super().__post_init__()
    _check_data(self, 'score', 'a reward model')
    if self.probes:
      raise UserError(
        f'reward.probes={self.probes} has no effect, because a reward model answers no prompts. '
        'Leave it out.'
      )
    if self.best_of_n < 0 or self.best_of_n == 1:
      raise UserError(f'reward.best_of_n={self.best_of_n} must be 0 or at least 2.')
    if self.best_of_n and not self.data:
      raise UserError(
        f'reward.best_of_n={self.best_of_n} needs a reward model, but reward.data is empty. Name '
        'comparisons in reward.data, or leave out reward.best_of_n.'
      )
