"""Ratings of single texts: likelihoods, judges, reward models, refusal classifiers and scorers.

To add a scorer, such as a guard model:

1. Write a file in this folder, such as `guard.py`, with a function that takes a `ModelLoader` and
   returns a `Scorer`. The loader loads language models and sequence classifiers.
2. Register the function with `@SCORERS.register('guard')`. `scorer.py` has an example.
3. Select it with `--config.evaluation.scorer=guard`.

A scorer can also live outside this package: name its file in `config.plugins`.
"""

from cai_jax.runtime.registry import import_submodules

import_submodules(__name__, __path__)
