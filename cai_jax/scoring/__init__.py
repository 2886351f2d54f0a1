"""What rates a single text: likelihoods, judges, reward models, refusal classifiers and scorers.

To add a scorer, such as a guard model:

1. Write a file in this folder, such as `guard.py`, with a function that takes a `ModelLoader` and
   returns a `Scorer`. The loader loads language models and sequence classifiers.
2. Register the function with `@SCORERS.register('guard')`, and import the file at the end of this
   one. `scorer.py` has an example.
3. Select it with `--config.evaluation.scorer=guard`.

A scorer can also live outside this package: name its file in `config.plugins` and skip the import.
"""

from cai_jax.scoring import scorer as scorer
