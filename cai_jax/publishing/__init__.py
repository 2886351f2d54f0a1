"""Models and data sets of finished runs as repositories of the Hugging Face hub, with their cards.

`kinds.KINDS` has what can be published: each entry checks that a run has it, writes its files and
its card. `command.py` is the command `publish`.
"""

from cai_jax.publishing import data_sets as data_sets  # registers its kinds
from cai_jax.publishing import model as model  # registers its kind
