"""How much helpful data should be mixed in? A frontier of harm against helpfulness.

Paper:     Bai et al. 2022, section 3.2 mixes two responses to each of 135,296 helpful prompts with
           the revisions, to keep the model helpful; other shares were not shown
Command:   python -m cai_jax.experiment --experiment=experiments/helpfulness_mix.py \\
             --workdir=runs/lab
Hardware:  two CPU cores; 7 minutes, 1.6 GB
Arms:      M_θ, and shares of 0 to one half of the training examples. The revisions are the same in
           all, so a larger share is also more steps
Expected:  in the embedded world revised answers stay answers: helpfulness has nothing to lose, and
           the share does nothing that the intervals of ±2 to 3 points can tell (RESULTS.md)
"""

from cai_jax.experiment import Arm, Experiment, rates_line

SHARES = (0.0, 0.1, 0.33, 0.5)


def get_experiment() -> Experiment:
  """The arms: M_θ, and M_aligned by share."""
  names = {share: f'{share:.0%} helpful' for share in SHARES}
  arms = {'M_θ': Arm({'train.helpfulness_share': SHARES[0]}, 'base')}
  arms |= {name: Arm({'train.helpfulness_share': share}) for share, name in names.items()}
  return Experiment(
    arms=arms,
    reference=names[SHARES[0]],
    overrides={'prompts.helpful.limit': 700},  # enough for a half
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
          f'Answers to held-out {told} prompts by the share of helpful examples',
          list(names.values()),
          [100 * share for share in SHARES],
          'helpful examples (% of all)',
          group,
          'share of answers (%)',
        )
        for group, told in (('harmful', 'baited'), ('helpful', 'benign'))
      ),
    ),
  )
