"""What a run trains on preferences: a reward model, a policy, and policies to compare with it."""

import dataclasses

from cai_jax.pipeline.preference_config import ROLES, PolicyConfig, RewardConfig
from cai_jax.pipeline.sections import RunConfig

REWARD_MODEL, POLICY = 'reward_model', 'policy'  # folders of a run, and names of what is in them
POLICIES = (POLICY, *(f'{POLICY}_{role}' for role in ROLES))  # names of the policies of any run
BEST_OF_N = 'best_of_n'  # folder of the best answers to the training prompts


@dataclasses.dataclass(frozen=True)
class Training:
  """One training on preferences.

  Attributes:
    name: name of what it trains, in the manifest and the evaluation, such as 'policy_base'.
    folder: folder of the trained model within the run's folder.
    init: the model that it starts from: 'aligned', 'base', 'init', or a folder or hub name.
    config: its settings.
  """

  name: str
  folder: str
  init: str
  config: PolicyConfig | RewardConfig

  @property
  def workdir(self) -> str:
    """Folder of its checkpoints and metrics within the run's folder."""
    return f'prefer/{self.name}'

  @property
  def is_policy(self) -> bool:
    """Whether it trains a policy, and not a reward model."""
    return self.name != REWARD_MODEL

  @property
  def compared_with(self) -> str:
    """The evaluated model that a policy is compared with: M_aligned if it starts there, or M_θ."""
    return 'aligned' if self.init == 'aligned' else 'base'


def list_policies(config: RunConfig) -> list[Training]:
  """Return the policies that a run trains, the main one first.

  Args:
    config: the settings of the run.
  """
  section = config.prefer
  if not section.data:
    return []
  others = [
    Training(f'{POLICY}_{name}', f'policies/{name}', name, section) for name in section.compare
  ]
  return [Training(POLICY, POLICY, section.init, section), *others]


def list_trainings(config: RunConfig) -> list[Training]:
  """Return all trainings on preferences of a run, in their order.

  Args:
    config: the settings of the run.
  """
  reward = config.reward
  first = [Training(REWARD_MODEL, REWARD_MODEL, reward.init, reward)] if reward.data else []
  return [*first, *list_policies(config)]


def trains_reward(config: RunConfig) -> bool:
  """Return whether a run trains a reward model."""
  return bool(config.reward.data)


def trains_preferences(config: RunConfig) -> bool:
  """Return whether a run trains anything on preferences."""
  return bool(list_trainings(config))
