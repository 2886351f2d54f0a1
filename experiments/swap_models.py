"""Who matters most, the generator, the critic or the reviser? All combinations of some models.

Paper:     Bai et al. 2022 use one model for all three roles
Command:   python -m cai_jax.experiment --experiment=experiments/swap_models.py --workdir=runs/lab
           python -m cai_jax.experiment --config=configs/mine.py --workdir=runs/mine \\
             --experiment=experiments/swap_models.py:FOLDER_OR_NAME,FOLDER_OR_NAME
Hardware:  two CPU cores; 5 minutes of CPU time for 300 prompts and three seeds, 1.4 GB
Arms:      for each combination of generator, critic and reviser, the last revision; and y_init of
           each generator. Combinations with the same generator revise the same y_init. k models
           make k³ combinations
Expected:  in the embedded world, with a model of 0.92 M and one of 0.21 M parameters, the reviser
           decides how many answers stay useful: 84 to 85 % with the small one, 88 to 90 % with the
           other, whoever generates and criticises. Between 19 and 24 % still break a rule, and no
           difference in that is significant (RESULTS.md)
"""

import itertools
import pathlib

from cai_jax.experiment import Arm, Experiment, rates_by_arm
from cai_jax.runtime.errors import UserError

EMBEDDED = 'tiny-1,tiny-small'  # pre-trained with one seed, on equally many tokens


def get_experiment(models: str = EMBEDDED) -> Experiment:
  """Return the experiment for a list of models.

  Args:
    models: embedded names, folders or Hugging Face hub names, separated by commas. The first one in
      all three roles is the reference.

  Raises:
    UserError: if there are fewer than two models, or one is named twice.
  """
  names = [name.strip() for name in models.split(',') if name.strip()]
  if len(names) < 2 or len({*names}) < len(names):
    raise UserError(
      f'The text after the colon names the models {names}. Give at least two different ones.'
    )
  short = [pathlib.PurePath(name).name for name in names]
  labels = dict(zip(names, short if len({*short}) == len(names) else names, strict=True))
  arms = {}
  for generator in names:
    overrides = _roles(generator, generator, generator)
    arms[f'{labels[generator]}: initial'] = Arm(
      overrides, 'initial', {'generator': labels[generator]}
    )
  for roles in itertools.product(names, repeat=3):
    generator, critic, reviser = (labels[name] for name in roles)
    facts = {'generator': generator, 'critic': critic, 'reviser': reviser}
    arms[f'{generator} / {critic} / {reviser}'] = Arm(_roles(*roles), 'last', facts)
  first = labels[names[0]]
  return Experiment(
    arms=arms,
    reference=f'{first} / {first} / {first}',
    model_by_seed=False,
    figures=(rates_by_arm('Last revisions by generator / critic / reviser', arms),),
  )


def _roles(generator: str, critic: str, reviser: str) -> dict[str, str]:
  """Return the config fields of three roles; '' is the generator, so that it is loaded once."""
  return {
    'model.base': generator,
    'model.critique': '' if critic == generator else critic,
    'model.revision': '' if reviser == generator else reviser,
  }
