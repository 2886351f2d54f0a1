"""Define, run, collect and estimate experiments: arms of one config, compared prompt by prompt."""

from cai_jax.experiment.define import Arm, Design, Experiment, load_principles
from cai_jax.experiment.figures import rate_differences, rates_by_arm, rates_line

__all__ = [
  'Arm',
  'Design',
  'Experiment',
  'load_principles',
  'rate_differences',
  'rates_by_arm',
  'rates_line',
]
