"""Define, run, collect and estimate experiments: arms of one config, compared prompt by prompt."""

from cai_jax.experiment.define import Arm, Experiment, rates_by_arm, rates_line

__all__ = ['Arm', 'Experiment', 'rates_by_arm', 'rates_line']
