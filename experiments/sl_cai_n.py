"""How many revisions should a model learn from? SL-CAI-n is fine-tuned on revisions 1 to n.

Paper:     Bai et al. 2022, section 3.4: models fine-tuned on all revisions up to the n-th, n =
           1..4, become more harmless as n grows
Command:   python -m cai_jax.experiment --experiment=experiments/sl_cai_n.py \\
             --workdir=runs/lab
Hardware:  two CPU cores; 6 to 8 minutes, 1.6 GB
Arms:      M_θ, and n = 1..4. A chain of n rounds starts like every longer chain, so no turn is
           sampled twice. All arms train for the same number of epochs: more revisions, more steps
Expected:  violations of M_aligned on held-out prompts fall with n: 85 % for M_θ, then 54, 46, 37
           and 32 %. A model fine-tuned on the last revision alone (control_initial) reaches 15 %,
           because earlier revisions still break rules (RESULTS.md)
"""

from cai_jax.experiment import Arm, Experiment, rates_line

ROUNDS = (1, 2, 3, 4)


def get_experiment() -> Experiment:
  """Return the experiment: M_θ and SL-CAI-n for each n."""
  runs = {n: {'feedback.rounds': n, 'train.target': 'all'} for n in ROUNDS}
  arms = {'M_θ': Arm(runs[ROUNDS[-1]], 'base')}
  arms |= {f'SL-CAI-{n}': Arm(overrides) for n, overrides in runs.items()}
  return Experiment(
    arms=arms,
    reference='M_θ',
    # One share for all arms, small enough that 400 helpful prompts suffice for n = 4.
    overrides={'train.helpfulness_share': 0.125},
    figures=tuple(
      rates_line(
        f'Answers to held-out {label} prompts of models that learnt n revisions',
        arms,
        [0, *ROUNDS],
        'n',
        group,
        'share of answers (%)',
      )
      for group, label in (('harmful', 'baited'), ('helpful', 'benign'))
    ),
  )
