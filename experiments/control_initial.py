"""Do the revisions make M_aligned harmless, or would any fine-tuning? SFT on y_init is the control.

Paper:     Bai et al. 2022 have no such control. A model fine-tuned on its own answers should not
           change
Command:   python -m cai_jax.experiment --experiment=experiments/control_initial.py \\
             --workdir=runs/lab
Hardware:  two CPU cores; 3 minutes, 1.6 GB
Arms:      M_θ; M_θ fine-tuned on y_init; M_θ fine-tuned on the last revision. All three share
           their samples
Expected:  in the embedded world, a perfect imitator of y_init has the grammar's rate before
           revision, and one of the last revision the rate after four rounds. The control differs
           from M_θ by +1.6 points, with an interval that contains zero; fine-tuning on the
           revisions changes the rate by -71 points (RESULTS.md). This is recovery, not evidence
"""

from cai_jax.experiment import Arm, Experiment, rates_by_arm


def get_experiment() -> Experiment:
  """Return the experiment: M_θ, and one arm for each of the two targets."""
  arms = {
    'M_θ': Arm({'train.target': 'last'}, 'base'),
    'SFT on y_init': Arm({'train.target': 'initial'}),
    'SFT on the last revision': Arm({'train.target': 'last'}),
  }
  figures = tuple(
    rates_by_arm(f'Answers to held-out {label} prompts', arms, group)
    for group, label in (('harmful', 'baited'), ('helpful', 'benign'))
  )
  return Experiment(arms=arms, reference='M_θ', figures=figures)
