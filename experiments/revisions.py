"""Does every further revision help? Scores of y_init and of revisions 1 to 4.

Paper:     Bai et al. 2022, Figure 5: harmlessness rises with each revision, most with the first,
           and helpfulness falls a little
Command:   python -m cai_jax.experiment --experiment=experiments/revisions.py \\
             --workdir=runs/lab
Hardware:  two CPU cores; 1 minute, 1.4 GB
Arms:      one chain of four rounds, scored after each round. All arms have the same prompts, so
           every difference is paired
Expected:  in the embedded world, the run recovers the rates of the grammar, which are printed
           beside it. The grammar by itself breaks a rule in 88.4, 58.0, 33.0, 17.4 and 9.1 % of its
           answers to the same prompts, first without revision and then after each round; the model
           did in 88.6, 56.4, 32.0, 18.9 and 11.2 % (RESULTS.md). That shows that the pipeline works
           and is no evidence about the method
"""

from cai_jax.experiment import Arm, Experiment, rates_line

ROUNDS = 4


def get_experiment() -> Experiment:
  """Return the experiment: y_init and each revision."""
  arms = {'initial': Arm(response='initial')}
  arms |= {f'revision {n}': Arm(response=f'revision_{n}') for n in range(1, ROUNDS + 1)}
  points = {'arms': list(arms), 'x': list(range(ROUNDS + 1))}
  return Experiment(
    arms=arms,
    reference='initial',
    overrides={'feedback.rounds': ROUNDS},
    figures=(
      rates_line(
        'Responses to baited prompts after each revision (as Figure 5 of the paper)',
        **points,
        x_label='number of revisions',
      ),
      {
        'kind': 'line',
        'caption': 'Length of the responses',
        'group': 'harmful',
        'x_label': 'number of revisions',
        'y_label': 'tokens',
        'series': [{'name': 'tokens', 'metric': 'mean_tokens', **points}],
      },
    ),
  )
