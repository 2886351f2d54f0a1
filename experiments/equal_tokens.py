"""Are n revisions better than the best of several answers that take as many tokens?

Paper:     Bai et al. 2022 have no such comparison
Command:   python -m cai_jax.experiment --workdir=runs/lab \\
             --experiment=experiments/equal_tokens.py:tiny-oracle
           python -m cai_jax.experiment --config=configs/mine.py --workdir=runs/mine \\
             --experiment=experiments/equal_tokens.py
Hardware:  two CPU cores; 3 minutes of CPU time for 200 prompts and two seeds, 1.4 GB
Arms:      M_θ's answers to held-out prompts; their revisions after 1 to 4 rounds; and for each
           number of rounds the best of as many answers as take no more sampled tokens than the
           prompt's own chain (evaluation.baselines=('best_of_tokens',)), chosen by the judge. The
           text after the colon is the judge; without it the config's judge chooses, or M_θ.
           Revisions are compared with M_θ's answer, and the best answer with the last revision of
           the same prompt. Tokens that models read do not count, nor does the judge
Expected:  in the embedded world, revisions win: at the tokens of four rounds, the best of up to 9
           answers leaves 49 % violations, and the last revision 17 %. The grammar decides this: an
           answer to two baits breaks no rule in 4 % of draws, and each round mends a sentence. The
           judge is the oracle, so this is the best case of best-of-n (RESULTS.md)
"""

import functools

from ml_collections import ConfigDict

from cai_jax.experiment import Arm, Design, Experiment, rate_differences

ROUNDS = (1, 2, 3, 4)
ANSWERS_PER_ROUND = 4  # at most: a critique and a revision seldom take the tokens of more answers


def get_experiment(judge: str = '') -> Design:
  """Return the design: revisions, and the best of several answers.

  Args:
    judge: the judge that chooses; '' is the config's.
  """
  return Design(functools.partial(compare_tokens, judge=judge))


def compare_tokens(config: ConfigDict, judge: str) -> Experiment:
  """Return the experiment for a config.

  Args:
    config: the base config. Its M_θ also stands in for M_aligned, so that nothing is trained.
    judge: the judge that chooses; '' is the config's.
  """
  fields = {
    n: {'feedback.rounds': n, 'evaluation.best_of_n': 1 + ANSWERS_PER_ROUND * n} for n in ROUNDS
  }
  arms = {'M_θ': Arm(fields[1], 'base')}
  for n in ROUNDS:
    arms[_revised(n)] = Arm(fields[n], 'revised', against='base')
    arms[_best(n)] = Arm(fields[n], 'best_of_tokens', against='revised')
  series = [
    {'name': name, 'arms': ['M_θ', *map(label, ROUNDS)], 'x': [0, *ROUNDS]}
    for name, label in (('revisions', _revised), ('best answer', _best))
  ]

  def line(caption: str, metric: str, y_label: str) -> dict:
    lines = [{**one, 'metric': metric} for one in series]
    x_label = 'rounds, or answers that cost as much'
    axes = {'group': 'harmful', 'x_label': x_label, 'y_label': y_label}
    return {'kind': 'line', 'caption': caption, **axes, 'series': lines}

  return Experiment(
    arms=arms,
    reference='M_θ',
    overrides={
      'model.aligned': config.model.base,
      'evaluation.baselines': ('best_of_tokens',),
      **({'evaluation.judge': judge} if judge else {}),
    },
    spent=True,
    figures=(
      line('Responses that break a rule, at equal tokens', 'violation_rate', 'share (%)'),
      line('Tokens sampled for a response', 'tokens_spent', 'tokens'),
      rate_differences('Best answer minus revision, at equal tokens', [_best(n) for n in ROUNDS]),
    ),
  )


def _revised(n: int) -> str:
  return f'revision {n}'


def _best(n: int) -> str:
  return f'best answer for {n}'
