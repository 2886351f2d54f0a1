"""How many revisions should be learnt from? SL-CAI-n: fine-tuned on revisions up to the n-th.

Paper:     Bai et al. 2022, section 3.4: models fine-tuned on all revisions up to the n-th, n =
           1..4, grow more harmless with n
Command:   python -m cai_jax.experiment --experiment=experiments/sl_cai_n.py \\
             --workdir=runs/lab
Hardware:  two CPU cores; 6 to 8 minutes, 1.6 GB
Arms:      M_θ, and n = 1..4. Chains of n rounds begin as those of more do, so no turn is sampled
           twice. Every arm trains for the same number of epochs: more revisions are more steps
Expected:  violations of M_aligned on held-out prompts fall with n: 85 % of M_θ's answers, then 54,
           46, 37 and 32 %. What has learnt the last revision alone (control_initial) comes to
           15 %: earlier revisions among the targets still break rules (RESULTS.md)
"""

from cai_jax.experiment import Arm, Experiment, rates_line

ROUNDS = (1, 2, 3, 4)


def get_experiment() -> Experiment:
  """The arms: M_θ and SL-CAI-n."""
  runs = {n: {'feedback.rounds': n, 'train.target': 'all'} for n in ROUNDS}
  arms = {'M_θ': Arm(runs[ROUNDS[-1]], 'base')}
  arms |= {f'SL-CAI-{n}': Arm(overrides) for n, overrides in runs.items()}
  return Experiment(
    arms=arms,
    reference='M_θ',
    # The same share for all, of which the 400 helpful prompts suffice for the most revisions.
    overrides={'train.helpfulness_share': 0.125},
    figures=tuple(
      rates_line(
        f'Answers to held-out {told} prompts of models that learnt n revisions',
        arms,
        [0, *ROUNDS],
        'n',
        group,
        'share of answers (%)',
      )
      for group, told in (('harmful', 'baited'), ('helpful', 'benign'))
    ),
  )
