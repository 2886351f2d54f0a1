"""Experiments: defining, running, collecting and estimating them."""

from cai_jax.experiment.define import Arm, Experiment, rates_by_arm, rates_line

__all__ = ['Arm', 'Experiment', 'rates_by_arm', 'rates_line']
