"""What does each step from D_CAI to a policy add, and what does it cost in tokens?

Paper:     Bai et al. 2022, figures 2 and 3, compare SL-CAI with what they train after it
Command:   python -m cai_jax.experiment --experiment=experiments/preference_steps.py \\
             --workdir=runs/lab
           python -m cai_jax.experiment --config=configs/mine.py --workdir=runs/mine \\
             --experiment=experiments/preference_steps.py
Hardware:  two CPU cores; 9 to 25 minutes for each seed on cores that other jobs shared, 1.7 GB
Arms:      M_θ; SL-CAI; SL-CAI fine-tuned longer, so that it learns about as many responses as
           SL-CAI and DPO together (a comparison has two, and each one counts); SL-CAI + DPO; DPO
           of M_θ without fine-tuning; the best of n answers of M_θ by the run's reward model, which
           takes n times the tokens for each answer; and DPO on comparisons whose sides are
           exchanged at random, a control that must not help. All answer the same held-out prompts
Expected:  in the embedded world, SL-CAI + DPO leaves fewer violations than SL-CAI, with shorter
           answers; experiments/RESULTS.md has three seeds
"""

from ml_collections import ConfigDict

from cai_jax.experiment import Arm, Design, Experiment, rate_differences, rates_by_arm

NO_REWARD = {  # of runs whose reward model no arm needs, and whose policies it does not compare
  'prefer.compare': (),
  'reward.data': '',
  'reward.best_of_n': 0,
  'evaluation.reward_model': '',
  'evaluation.reward_labelled': '',
  'evaluation.baselines': (),
  'evaluation.best_of_n': 0,
}
STEPS = ('M_θ', 'SL-CAI', 'SL-CAI longer', 'SL-CAI + DPO', 'DPO alone', 'best of n', 'shuffled')


def get_experiment() -> Design:
  """Return the design, whose longer fine-tuning depends on the config."""
  return Design(compare_steps, base='configs/tiny_preferences.py')


def compare_steps(config: ConfigDict) -> Experiment:
  """Return the experiment for a config.

  Args:
    config: the base config, with prefer.data, prefer.compare=('base',), and the baseline
      'best_of_reward'.
  """
  longer = {'train.epochs': equal_epochs(config), **NO_REWARD, 'prefer.data': ''}
  overrides: tuple[dict, ...] = ({}, {}, longer, {}, {}, {})
  responses = ('base', 'aligned', 'aligned', 'policy', 'policy_base', 'best_of_reward')
  arms = {
    name: Arm(fields, response)
    for name, fields, response in zip(STEPS, overrides, responses, strict=False)
  }
  arms['shuffled'] = Arm({'prefer.shuffle': True, **NO_REWARD}, 'policy')
  others = [name for name in STEPS if name != 'SL-CAI']
  return Experiment(
    arms=arms,
    reference='SL-CAI',
    spent=True,
    distance=True,
    figures=(
      rates_by_arm('Held-out harmful prompts', STEPS),
      rates_by_arm('Held-out helpful prompts', STEPS, 'helpful'),
      rate_differences('Differences to SL-CAI', others),
      {
        'kind': 'frontier',
        'caption': 'Harm and help',
        'x': ['harmful', 'violation_rate'],
        'y': ['helpful', 'helpful_rate'],
        'arms': list(STEPS),
      },
    ),
  )


def equal_epochs(config: ConfigDict) -> int:
  """Return for how many epochs to fine-tune, to learn as many responses as with preferences.

  Each harmful prompt gives a comparison, and fine-tuning adds helpful examples to their share.

  Args:
    config: the base config.
  """
  responses = 2 * (1 - config.train.helpfulness_share)  # of comparisons, for each example
  return config.train.epochs + round(config.prefer.epochs * responses)
