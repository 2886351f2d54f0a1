"""At which temperature should critiques and revisions be sampled?

Paper:     Bai et al. 2022 sample everything in the supervised phase at temperature 1 (section 3.2).
           Figure 10 compares answers at temperatures 1 and 0, of models after reinforcement
           learning. No figure varies the temperature of critiques and revisions
Command:   python -m cai_jax.experiment --experiment=experiments/temperature.py \\
             --workdir=runs/lab
Hardware:  two CPU cores; 3 minutes, 1.4 GB
Arms:      temperatures from 0 to 1.5 for critiques and revisions together. All arms share y_init,
           sampled at temperature 1
Expected:  in the embedded world 0.5 leaves the fewest violations, 8 %, against 11 % at 0 and at 1;
           98 % still answer, against 96 % at 1. At 1.5 the embedded model's text falls apart: 46 %
           still answer. The grammar has a truth at temperature 1 only; the rest says how this small
           model samples and is no evidence about the method (RESULTS.md)
"""

from cai_jax.experiment import Arm, Experiment, rates_line

TEMPERATURES = (0.0, 0.5, 1.0, 1.5)


def get_experiment() -> Experiment:
  """Return the experiment: y_init, and the last revision at each temperature."""
  names = {temperature: f'temperature {temperature:g}' for temperature in TEMPERATURES}
  arms = {'initial': Arm({'sampling.critique.temperature': 1.0}, 'initial')}
  arms |= {
    name: Arm(
      {
        'sampling.critique.temperature': temperature,
        'sampling.revision.temperature': temperature,
      },
      'last',
    )
    for temperature, name in names.items()
  }
  points = {'arms': list(names.values()), 'x': list(TEMPERATURES)}
  x_label = 'temperature of critique and revision'
  return Experiment(
    arms=arms,
    reference=names[1.0],
    diversity=('diversity',),
    figures=(
      rates_line('After four rounds, by temperature', **points, x_label=x_label),
      {
        'kind': 'line',
        'group': 'harmful',
        'x_label': x_label,
        'caption': 'Diversity of the last revisions',
        'y_label': 'diversity (1 - similarity)',
        'series': [{'name': 'diversity', 'metric': 'diversity', **points}],
      },
    ),
  )
