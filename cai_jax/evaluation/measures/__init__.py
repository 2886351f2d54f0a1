"""The built-in measures, one file each. Importing the package registers them.

To add one, write a file here that registers its measure (see `cai_jax.evaluation.registries`). A
measure of your own can also live outside this package, in a file that `config.plugins` names.
"""

# Files and tables list measures in the order of registration, so these imports are not sorted.
# isort: off
from cai_jax.evaluation.measures import verdicts as verdicts
from cai_jax.evaluation.measures import length as length
from cai_jax.evaluation.measures import refusal_rate as refusal_rate
from cai_jax.evaluation.measures import mean_reward as mean_reward
from cai_jax.evaluation.measures import off_topic as off_topic
from cai_jax.evaluation.measures import looping as looping
from cai_jax.evaluation.measures import changed as changed
from cai_jax.evaluation.measures import truncated as truncated
from cai_jax.evaluation.measures import multiple_choice as multiple_choice
from cai_jax.evaluation.measures import held_out_loss as held_out_loss
from cai_jax.evaluation.measures import kl_divergence as kl_divergence
from cai_jax.evaluation.measures import judge_comparison as judge_comparison

from cai_jax.runtime.registry import import_submodules

import_submodules(__name__, __path__)
