"""How many revisions should a model learn from? SL-CAI-n is fine-tuned on revisions 1 to n.

Paper:     Bai et al. 2022, section 3.4, fine-tune SL-CAI-n on the revisions up to and including the
           n-th, n = 1..4. The text of the section states no result for them
Command:   python -m cai_jax.experiment --experiment=experiments/sl_cai_n.py \\
             --workdir=runs/lab
Hardware:  two CPU cores; 6 to 8 minutes, 1.6 GB
Arms:      M_θ, and n = 1..4. A chain of n rounds starts like every longer chain, so no turn is
           sampled twice. All arms train for the same number of epochs: more revisions, more steps
Expected:  in the embedded world, a perfect imitator of the revisions 1 to n has the mean of the
           grammar's rates of these rounds, which is printed beside the model: 57.8, 44.2, 35.7 and
           28.9 %. M_aligned broke a rule in 54, 46, 37 and 32 % of its answers, M_θ in 85 %
           (RESULTS.md)
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
