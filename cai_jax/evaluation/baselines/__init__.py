"""Baselines: what M_θ does with the same information and without training, one file each.

A baseline changes the held-out prompts, M_θ answers them, and its answers are scored beside those
of M_θ and M_aligned. To add one, register a function from a constitution and prompts to prompts.
A baseline that chooses among several answers of M_θ is a `Selection` instead.

  from cai_jax.evaluation.baselines.registry import BASELINES

  @BASELINES.register('be_kind')
  def ask_for_kindness(constitution, prompts):
    ...
"""

from cai_jax.evaluation.baselines.registry import BASELINES as BASELINES
from cai_jax.evaluation.baselines.registry import BY_JUDGE as BY_JUDGE
from cai_jax.evaluation.baselines.registry import BY_REWARD as BY_REWARD
from cai_jax.evaluation.baselines.registry import Selection as Selection
from cai_jax.runtime.registry import import_submodules

import_submodules(__name__, __path__)
