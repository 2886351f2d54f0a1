"""Do larger models critique and revise better? The same chains with models of several sizes.

Paper:     Bai et al. 2022, Figures 5 and 7, show several sizes up to 52 B parameters
Command:   python -m cai_jax.experiment --experiment=experiments/model_size.py \\
             --workdir=runs/lab
           python -m cai_jax.experiment --workdir=runs/sizes --config=configs/qwen2_5_0_5b.py \\
             --experiment=experiments/model_size.py:Qwen/Qwen2.5-0.5B,Qwen/Qwen2.5-1.5B
Hardware:  two CPU cores; 4 minutes, 1.6 GB
Arms:      for each model, on held-out prompts: its answers, its last revisions of them, and the
           answers of the model fine-tuned from it
Expected:  two embedded models (0.21 M and 0.92 M parameters) that were pre-trained with one seed on
           the same 5 million tokens, with the grammar's rates beside them. Both imitate one
           grammar, so this shows how well a size recovers it and nothing about larger models. All
           seeds share the two models. An earlier comparison of models that had seen 10 and 14
           million tokens could not tell size from training (RESULTS.md)
"""

from cai_jax.experiment import Arm, Experiment, rates_by_arm

EMBEDDED = 'tiny-small,tiny-1'  # pre-trained with one seed, on equally many tokens
RESPONSES = {'initial': 'base', 'revised': 'revised', 'aligned': 'aligned'}


def get_experiment(models: str = EMBEDDED) -> Experiment:
  """Return the experiment for a list of models.

  Args:
    models: embedded names, folders or Hugging Face hub names, separated by commas. The last one
      is the reference.
  """
  names = [name.strip() for name in models.split(',') if name.strip()]
  arms = {
    f'{name}: {label}': Arm({'model.base': name}, response)
    for name in names
    for label, response in RESPONSES.items()
  }
  return Experiment(
    arms=arms,
    reference=f'{names[-1]}: initial',
    model_by_seed=False,  # the small model exists for one seed of pre-training
    figures=tuple(
      rates_by_arm(
        f'Answers to held-out {label} prompts: initial, revised, after fine-tuning', arms, group
      )
      for group, label in (('harmful', 'harmful'), ('helpful', 'benign'))
    ),
  )
