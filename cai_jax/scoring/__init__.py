"""Ratings of single texts: likelihoods, judges, guards, reward models, classifiers and scorers.

To add a scorer:

1. Write a file in this folder, such as `rules.py`, with a function that takes a `ModelLoader` and
   returns a `Scorer`. The loader loads language models and sequence classifiers.
2. Register the function with `@SCORERS.register('rules')`. `scorer.py` has an example.
3. Select it with `--config.evaluation.scorer=rules`.

Guard models have a folder of their own, `guards/`, and so have `rubrics/` of a judge.

A scorer can also live outside this package: name its file in `config.plugins`.
"""

from cai_jax.runtime.registry import import_submodules

import_submodules(__name__, __path__)
