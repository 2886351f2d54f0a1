"""The files of the embedded world that come with the package.

Importing this module registers the constitution as 'tiny'.
"""

import pathlib

from cai_jax.constitution import CONSTITUTIONS

_FOLDER = pathlib.Path(__file__).parent
CONSTITUTION = CONSTITUTIONS.register('tiny')(str(_FOLDER / 'constitution.yaml'))
# Hugging Face folders; `cai_jax.tiny.pretrain` says how each was made.
MODELS = {
  'tiny': _FOLDER / 'model',
  'tiny-1': _FOLDER / 'model_1',
  'tiny-2': _FOLDER / 'model_2',
  'tiny-small': _FOLDER / 'model_small',
}
BY_SEED = {'tiny': ('tiny', 'tiny-1', 'tiny-2')}  # models of one size by seed of pre-training


def model_path(name: str) -> str:
  """Return the folder of an embedded model, or the unchanged name of any other model.

  Args:
    name: 'tiny', 'tiny-1', 'tiny-2', 'tiny-small', or a folder or hub name of another checkpoint.
  """
  return str(MODELS.get(name, name))


def model_of_seed(name: str, seed: int) -> str:
  """Return the embedded model that was pre-trained with a seed, or any other model unchanged.

  Args:
    name: name of the embedded model of seed 0, or of any other model.
    seed: seed of an experiment. Seeds beyond the last model start again with the first.
  """
  names = BY_SEED.get(name, (name,))
  return names[seed % len(names)]
