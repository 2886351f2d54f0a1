"""Is it the revisions, or fine-tuning itself? SFT on y_init as the control.

Paper:     none of Bai et al. 2022's; a model that learns its own answers should stay as it is
Command:   python -m cai_jax.experiment --experiment=experiments/control_initial.py \\
             --workdir=runs/lab
Hardware:  two CPU cores; 3 minutes, 1.6 GB
Arms:      M_θ; fine-tuned on y_init; fine-tuned on the last revision. The two share all samples
Expected:  the control's difference to M_θ has an interval that holds zero (+1.6 points); that of
           the revisions is -71 points (RESULTS.md)
"""

from cai_jax.experiment import Arm, Experiment, rates_by_arm


def get_experiment() -> Experiment:
  """The arms: M_θ and the two targets."""
  arms = {
    'M_θ': Arm({'train.target': 'last'}, 'base'),
    'SFT on y_init': Arm({'train.target': 'initial'}),
    'SFT on the last revision': Arm({'train.target': 'last'}),
  }
  figures = tuple(
    rates_by_arm(f'Answers to held-out {told} prompts', arms, group)
    for group, told in (('harmful', 'baited'), ('helpful', 'benign'))
  )
  return Experiment(arms=arms, reference='M_θ', figures=figures)
