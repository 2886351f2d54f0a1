"""Rubrics, one file each. Importing the package registers them in `rubric.RUBRICS`.

To add one, write a file in this folder, or one that `config.plugins` names, that registers a
`Rubric`.
"""

from cai_jax.runtime.registry import import_submodules

import_submodules(__name__, __path__)
