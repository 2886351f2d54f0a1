"""Which principle changes how much, in which direction? Revisions by the principle they drew.

Paper:     Bai et al. 2022 draw a principle for each revision (section 3.1) and do not compare them
Command:   python -m cai_jax.experiment --experiment=experiments/principle_drawn.py \\
             --workdir=runs/lab
           python -m cai_jax.experiment --config=configs/mine.py --workdir=runs/mine \\
             --experiment=experiments/principle_drawn.py:2
Hardware:  two CPU cores; 1 minute of CPU time for 300 prompts, 1.4 GB
Arms:      the revisions of one round of one run of the config, all together and by principle. The
           text after the colon is the number of the round, 1 by default. Each revision is compared
           with the response that it revises, prompt by prompt; Holm's method covers all
           principles. Chance alone decides which prompts draw a principle, so the groups can be
           compared, but each has few prompts and other ones
Expected:  in the embedded world, the six principles that cover four kinds of rule each take away
           25 to 32 points of violations in the first round, with intervals of ±8 to 28 points from
           150 prompts each. They overlap, as they should: all six cover equally many (RESULTS.md)
"""

import functools

from ml_collections import ConfigDict

from cai_jax.experiment import Arm, Design, Experiment, load_principles, rate_differences
from cai_jax.runtime.errors import UserError

ALL = 'all principles'


def get_experiment(number: str = '1') -> Design:
  """Return the design: one arm for each principle of the config.

  Args:
    number: the round whose revisions are compared with the responses before them, from '1'.

  Raises:
    UserError: if that is no round.
  """
  if not number.isdecimal() or not int(number):
    raise UserError(f'The text after the colon is {number!r}. It must be a round, such as 1.')
  return Design(functools.partial(by_principle, number=int(number)))


def by_principle(config: ConfigDict, number: int) -> Experiment:
  """Return the experiment: the revisions of a round, by principle.

  Args:
    config: the base config, which names the constitution.
    number: the round, from 1.
  """
  before = f'revision_{number - 1}' if number > 1 else 'initial'
  revision = f'revision_{number}'
  groups = {
    principle.id.replace(',', ';'): Arm({}, revision, against=before, principle=principle.id)
    for principle in load_principles(config)
  }
  return Experiment(
    arms={ALL: Arm({}, revision, against=before), **groups},
    reference=ALL,
    figures=(
      rate_differences(f'What round {number} changes, by the principle drawn', [ALL, *groups]),
      {
        'kind': 'arms',
        'caption': f'How much round {number} rewrites, by the principle drawn',
        'group': 'harmful',
        'metrics': ['rewritten', 'mean_tokens'],
        'arms': [ALL, *groups],
      },
    ),
  )
