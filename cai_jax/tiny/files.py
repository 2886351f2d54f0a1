"""The files of the embedded world that come with the package.

Importing this module registers the constitution as 'tiny'.
"""

import pathlib

from cai_jax.constitution import CONSTITUTIONS

_FOLDER = pathlib.Path(__file__).parent
CONSTITUTION = CONSTITUTIONS.register('tiny')(str(_FOLDER / 'constitution.yaml'))
MODELS = {'tiny': _FOLDER / 'model', 'tiny-small': _FOLDER / 'model_small'}  # Hugging Face folders
