"""How hot should critiques and revisions be sampled?

Paper:     Bai et al. 2022 sample all at temperature 1 and show no other
Command:   python -m cai_jax.experiment --experiment=experiments/temperature.py \\
             --workdir=runs/lab
Hardware:  two CPU cores; 3 minutes, 1.4 GB
Arms:      temperatures 0 to 1.5 of critique and revision together; y_init is sampled at 1 in all
           and so is the same
Expected:  0.5 is best: 8 % break a rule, against 11 % at 0 and at 1, and 98 % still answer, against
           96 % at 1. At 1.5 the embedded model garbles: 46 % still answer (RESULTS.md)
"""

from cai_jax.experiment import Arm, Experiment, rates_line

TEMPERATURES = (0.0, 0.5, 1.0, 1.5)


def get_experiment() -> Experiment:
  """The arms: y_init and the last revision by temperature."""
  names = {heat: f'temperature {heat:g}' for heat in TEMPERATURES}
  arms = {'initial': Arm({'sampling.critique.temperature': 1.0}, 'initial')}
  arms |= {
    name: Arm(
      {'sampling.critique.temperature': heat, 'sampling.revision.temperature': heat}, 'last'
    )
    for heat, name in names.items()
  }
  places = {'arms': list(names.values()), 'x': list(TEMPERATURES)}
  x_label = 'temperature of critique and revision'
  return Experiment(
    arms=arms,
    reference=names[1.0],
    diversity=True,
    figures=(
      rates_line('After four rounds, by temperature', **places, x_label=x_label),
      {
        'kind': 'line',
        'group': 'harmful',
        'x_label': x_label,
        'caption': 'Diversity of the last revisions',
        'y_label': 'diversity (1 - similarity)',
        'series': [{'name': 'diversity', 'metric': 'diversity', **places}],
      },
    ),
  )
