"""Guard models, one file for each kind. Importing the package registers them in `guard.GUARDS`.

To add a kind, write a file in this folder, or one that `config.plugins` names, that registers a
`Guard`.
"""

from cai_jax.runtime.registry import import_submodules

import_submodules(__name__, __path__)
