"""Results of other evaluation programs, one file for each program.

To add one, write a file here that registers a `Reader` (see `cai_jax.evaluation.external.readers`).
"""

from cai_jax.evaluation.external.readers import READERS as READERS
from cai_jax.evaluation.external.readers import Metric as Metric
from cai_jax.evaluation.external.readers import read_results as read_results
from cai_jax.runtime.registry import import_submodules

import_submodules(__name__, __path__)
