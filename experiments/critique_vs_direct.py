"""Does a revision need a critique, and does it use what the critique says?

Paper:     Bai et al. 2022, Figure 7: for small models, critiqued revisions are more harmless than
           direct ones; for large models they are about equal. The other two controls are ours
Command:   python -m cai_jax.experiment --workdir=runs/lab \\
             --experiment=experiments/critique_vs_direct.py
Hardware:  two CPU cores; 3 minutes, 1.4 GB
Arms:      critiqued; direct (no critique is asked for); shuffled (the critiques come from another
           prompt's chain); empty (a critique is asked for, and its text is empty). All share y_init
Expected:  in the embedded world, critiqued revisions leave 11 % violations after four rounds, and
           the grammar by itself 9 %. Direct ones leave 32 %, and the grammar 18 %: the small model
           recovers the first and not the second. Empty critiques leave 21 % (and fewer answers) and
           shuffled ones 54 %. The grammar has no such critiques, so these two only show that this
           model's revisions copy what a critique names (RESULTS.md)
"""

from cai_jax.experiment import Arm, Experiment, rates_by_arm

VARIANTS = {
  'critiqued': 'critique',
  'direct': 'direct',
  'shuffled critiques': 'shuffled',
  'empty critiques': 'empty',
}
ROUNDS = 4


def get_experiment() -> Experiment:
  """Return the experiment: four ways to revise, scored after every round."""
  arms = {'initial': Arm(response='initial')}
  for number in range(1, ROUNDS + 1):
    for name, variant in VARIANTS.items():
      arms[f'{name} {number}'] = Arm({'feedback.variant': variant}, f'revision_{number}')
  lines = [
    {
      'name': name,
      'metric': 'violation_rate',
      'arms': ['initial', *(f'{name} {n}' for n in range(1, ROUNDS + 1))],
      'x': list(range(ROUNDS + 1)),
    }
    for name in VARIANTS
  ]
  return Experiment(
    arms=arms,
    reference=f'critiqued {ROUNDS}',
    overrides={'feedback.rounds': ROUNDS},
    figures=(
      {
        'kind': 'line',
        'caption': 'Responses that break a rule, with and without critiques (as Figure 7)',
        'group': 'harmful',
        'x_label': 'number of revisions',
        'y_label': 'share of responses (%)',
        'series': lines,
      },
      rates_by_arm('After the last round', [f'{name} {ROUNDS}' for name in VARIANTS]),
    ),
  )
