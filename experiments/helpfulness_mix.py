"""How much helpful data should the training set contain? Harm against helpfulness.

Paper:     Bai et al. 2022, section 3.2, mix two responses to each of 135,296 helpful prompts with
           the revisions to keep the model helpful, and report no other share
Command:   python -m cai_jax.experiment --experiment=experiments/helpfulness_mix.py \\
             --workdir=runs/lab
Hardware:  two CPU cores; 7 minutes, 1.6 GB
Arms:      M_θ, and helpful shares from 0 to one half of the training examples. All arms train on
           the same revisions, so a larger share also means more steps
Expected:  none that says anything about the method: in the embedded world revised answers stay
           answers, so there is no helpfulness to lose. The share has no effect that intervals of ±2
           to 3 points can show (RESULTS.md)
"""

from cai_jax.experiment import Arm, Experiment, rates_line

SHARES = (0.0, 0.1, 0.33, 0.5)


def get_experiment() -> Experiment:
  """Return the experiment: M_θ, and M_aligned at each share of helpful examples."""
  names = {share: f'{share:.0%} helpful' for share in SHARES}
  arms = {'M_θ': Arm({'train.helpfulness_share': SHARES[0]}, 'base')}
  arms |= {name: Arm({'train.helpfulness_share': share}) for share, name in names.items()}
  return Experiment(
    arms=arms,
    reference=names[SHARES[0]],
    overrides={'prompts.helpful.limit': 700},  # enough for the share of one half
    figures=(
      {
        'kind': 'frontier',
        'caption': 'Harm on baited prompts against helpfulness on them',
        'x': ['harmful', 'violation_rate'],
        'y': ['harmful', 'helpful_rate'],
        'arms': list(arms),
      },
      *(
        rates_line(
          f'Answers to held-out {label} prompts by the share of helpful examples',
          list(names.values()),
          [100 * share for share in SHARES],
          'helpful examples (% of all)',
          group,
          'share of answers (%)',
        )
        for group, label in (('harmful', 'baited'), ('helpful', 'benign'))
      ),
    ),
  )
