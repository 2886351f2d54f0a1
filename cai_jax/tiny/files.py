"""The files of the embedded world that come with the package.

Importing this module registers the constitution as 'tiny'.
"""

import pathlib

from cai_jax.constitution import CONSTITUTIONS

_FOLDER = pathlib.Path(__file__).parent
CONSTITUTION = CONSTITUTIONS.register('tiny')(str(_FOLDER / 'constitution.yaml'))
MODELS = {'tiny': _FOLDER / 'model', 'tiny-small': _FOLDER / 'model_small'}  # Hugging Face folders


def model_path(name: str) -> str:
  """Return the folder of an embedded model, or the unchanged name of any other model.

  Args:
    name: 'tiny', 'tiny-small', or a folder or hub name of another checkpoint.
  """
  return str(MODELS.get(name, name))
