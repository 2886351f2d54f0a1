"""What does each principle add to the others? The constitution without each of them in turn.

Paper:     Bai et al. 2022 compare constitutions of 1 to 16 principles (Figure 6) and leave out no
           single one
Command:   python -m cai_jax.experiment --experiment=experiments/leave_one_out.py --workdir=runs/lab
           python -m cai_jax.experiment --config=configs/mine.py --workdir=runs/mine \\
             --experiment=experiments/leave_one_out.py:aligned
Hardware:  two CPU cores; 3 minutes of CPU time for six principles and 300 prompts, 1.4 GB
Arms:      all principles of the config's constitution, and all but one for each of them. The text
           after the colon is the response to score: last (default), revised or aligned. Only
           prompts that drew the missing principle draw again (constitution.leave_out), so all
           others keep their texts, and an arm samples little
Expected:  in the embedded world with six principles that cover each kind of rule three times, no
           principle is missed: without one of them, 18.8 to 20.4 % of the last revisions break a
           rule instead of 18.7 %, and no difference is significant (RESULTS.md)
"""

import functools

from ml_collections import ConfigDict

from cai_jax.experiment import Arm, Design, Experiment, load_principles, rate_differences
from cai_jax.runtime.errors import UserError

ALL = 'all principles'


def get_experiment(response: str = 'last') -> Design:
  """Return the design: one arm for each principle of the config.

  Args:
    response: the response to score, such as 'last' or 'aligned'.
  """
  return Design(functools.partial(leave_one_out, response=response))


def leave_one_out(config: ConfigDict, response: str) -> Experiment:
  """Return the experiment: all principles, and all but one.

  Args:
    config: the base config, which names the constitution.
    response: the response to score.

  Raises:
    UserError: if the constitution has a single principle.
  """
  ids = [principle.id for principle in load_principles(config)]
  if len(ids) < 2:
    raise UserError(
      f'The constitution has the principles {ids}. To leave one out, it needs at least two.'
    )
  missing = tuple(config.constitution.leave_out)
  without = {f'without {name.replace(",", ";")}': name for name in ids}
  arms = {ALL: Arm({}, response)}
  arms |= {
    arm: Arm({'constitution.leave_out': (*missing, name)}, response)
    for arm, name in without.items()
  }
  caption = f'What changes without a principle (response: {response})'
  return Experiment(
    arms=arms,
    reference=ALL,
    figures=(
      rate_differences(caption, list(without)),
      {
        'kind': 'differences',
        'caption': f'Length without a principle (response: {response})',
        'group': 'harmful',
        'metrics': ['mean_tokens'],
        'arms': list(without),
      },
    ),
  )
