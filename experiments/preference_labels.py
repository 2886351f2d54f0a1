"""Whose preferences teach more: the revisions' own, an AI's, or the truth?

Paper:     Bai et al. 2022, section 4.1: labels of a feedback model. Implied comparisons (a revision
           over what it revises) are not in the paper
Command:   python -m cai_jax.experiment --experiment=experiments/preference_labels.py \\
             --workdir=runs/lab
           python -m cai_jax.experiment --config=configs/mine.py --workdir=runs/mine \\
             --experiment=experiments/preference_labels.py:MODEL
Hardware:  two CPU cores; 2 to 4 minutes for each of a seed's four runs with half of the prompts, on
           cores that other jobs shared
Arms:      SL-CAI; and four policies that start from it and differ in what they learn: implied
           comparisons of D_CAI; comparisons of two answers of SL-CAI that M_θ labels; the same
           answers labelled by the judge after the colon, by default the oracle of the embedded
           world; and the implied comparisons with their sides exchanged at random, a control that
           must not help
Expected:  in the embedded world (one seed, half of the prompts), 27.5 % of SL-CAI's answers break a
           rule, 4.0 % after DPO on implied comparisons and 11.5 % on the oracle's labels. M_θ has
           never read such a question: its labels are noise (53 of 100 labelled pairs), and teach
           nothing. experiments/RESULTS.md has the intervals
"""

from cai_jax.experiment import Arm, Experiment, rate_differences, rates_by_arm

LABELS = {'label.responses': 2, 'prefer.data': 'labels'}
ACCURACY = {'label.labelled': ('tiny',), 'label.labelled_limit': 100}


def get_experiment(judge: str = 'tiny-oracle') -> Experiment:
  """Return the experiment.

  Args:
    judge: who labels in the third arm: a registered judge, a folder or a hub name.
  """
  arms = {
    'SL-CAI': Arm({}, 'aligned'),
    'implied': Arm({}, 'policy'),
    'labels of M_θ': Arm({**LABELS, **ACCURACY, 'label.model': 'base'}, 'policy'),
    f'labels of {judge or "tiny-oracle"}': Arm(
      {**LABELS, 'label.model': judge or 'tiny-oracle'}, 'policy'
    ),
    'shuffled': Arm({'prefer.shuffle': True}, 'policy'),
  }
  policies = [name for name in arms if name != 'SL-CAI']
  return Experiment(
    arms=arms,
    reference='SL-CAI',
    base='configs/tiny_preferences.py',
    overrides={  # one policy, and no reward model: the arms differ in what the policy learns
      'prefer.compare': (),
      'reward.data': '',
      'evaluation.reward_model': '',
      'evaluation.reward_labelled': '',
      'evaluation.baselines': (),
      'evaluation.best_of_n': 0,
    },
    distance=True,
    figures=(
      rates_by_arm('Held-out harmful prompts', list(arms)),
      rates_by_arm('Held-out helpful prompts', list(arms), 'helpful'),
      rate_differences('Differences to SL-CAI', policies),
    ),
  )
