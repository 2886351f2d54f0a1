"""Which principle changes how much, in which direction? Each principle alone, on all prompts.

Paper:     Bai et al. 2022, Figure 6, has a constitution of one principle, and no comparison of them
Command:   python -m cai_jax.experiment --experiment=experiments/principle_alone.py \\
             --workdir=runs/lab
Hardware:  two CPU cores; 2 minutes of CPU time for six principles and 300 prompts, 1.4 GB
Arms:      y_init, and one round of critique and revision under each principle of the config. All
           arms revise the same y_init, which is sampled once. So differences between two principles
           are paired too, unlike those of experiments/principle_drawn.py, at the cost of one
           critique and one revision of each prompt for each principle
Expected:  in the embedded world, the six principles that cover four kinds of rule each take away
           27 to 30 points of violations in one round, where the grammar takes 22 to 24. So the
           small model revises more than the grammar does, whatever the principle (RESULTS.md)
"""

from ml_collections import ConfigDict

from cai_jax.experiment import Arm, Design, Experiment, load_principles, rate_differences


def get_experiment() -> Design:
  """Return the design: one arm for each principle of the config."""
  return Design(each_alone)


def each_alone(config: ConfigDict) -> Experiment:
  """Return the experiment: y_init, and a revision under each principle.

  Args:
    config: the base config, which names the constitution.
  """
  ids = [principle.id for principle in load_principles(config)]
  alone = {name.replace(',', ';'): {'constitution.ids': (name,)} for name in ids}
  arms = {name: Arm(fields, 'last', against='initial') for name, fields in alone.items()}
  first = next(iter(alone))
  return Experiment(
    arms={'initial': Arm(alone[first], 'initial'), **arms},
    reference='initial',
    overrides={'feedback.rounds': 1, 'constitution.leave_out': ()},
    figures=(
      rate_differences('What one revision changes, by principle', list(arms)),
      {
        'kind': 'arms',
        'caption': 'How much one revision rewrites, by principle',
        'group': 'harmful',
        'metrics': ['rewritten', 'mean_tokens'],
        'arms': list(arms),
      },
    ),
  )
