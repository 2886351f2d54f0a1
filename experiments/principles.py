"""Is it the number of principles, or what they cover? Constitutions of 1 to 16 principles.

Paper:     Bai et al. 2022, Figure 6: the number of principles has no great effect on harmlessness;
           diversity of the responses was thought to gain, and was not measured
Command:   python -m cai_jax.experiment --experiment=experiments/principles.py \\
             --workdir=runs/lab
Hardware:  two CPU cores; 5 minutes, 1.4 GB
Arms:      1, 2, 4, 8 and 16 principles whose mean coverage is held near 4 of the 8 kinds of rule;
           and 4 principles that cover 1, 4 or 8 kinds each. `coverage` is the mean number of kinds
           that a drawn principle names, `union` the number that any of them names
Expected:  violations left after four rounds follow coverage: 65, 17 and 3 % for 1, 4 and 8 kinds
           a principle. At equal coverage and a union of all kinds 2 to 16 principles leave 16 to
           20 %, and a single one, which never sees four kinds, 42 %. Diversity hardly moves
           (RESULTS.md)
"""

from cai_jax.experiment import Arm, Experiment, rates_line
from cai_jax.tiny import corpus

NARROW = ('insult', 'privacy', 'danger', 'theft', 'threat', 'rumour', 'lie', 'waste')
GROUPS = ('people', 'things', 'law', 'manners', 'trust', 'harm')
GENERAL = ('all-wrong', 'all-good', 'all-harmless', 'all-fair')
COUNTS = {
  1: GROUPS[:1],
  2: GROUPS[:2],
  4: GROUPS[:4],
  8: GROUPS + NARROW[:2],
  16: GROUPS + NARROW + GENERAL[:2],
}
COVERED = {'narrow': NARROW[:4], 'group': GROUPS[:4], 'general': GENERAL}


def get_experiment() -> Experiment:
  """The arms: sets of principles, scored after the last round."""
  arms = {f'{count} principles': _arm(ids) for count, ids in COUNTS.items()}
  arms['1 principle'] = arms.pop('1 principles')
  arms = {'initial': Arm(response='initial'), '1 principle': arms.pop('1 principle'), **arms}
  by_cover = {'narrow': '4 narrow principles', 'general': '4 general principles'}
  arms |= {name: _arm(COVERED[cover]) for cover, name in by_cover.items()}
  counted = ['1 principle', *(f'{count} principles' for count in COUNTS if count > 1)]
  covering = [by_cover['narrow'], '4 principles', by_cover['general']]
  by_count = {'arms': counted, 'x': list(COUNTS)}
  by_coverage = {'arms': covering, 'x': [arms[name].facts['coverage'] for name in covering]}
  return Experiment(
    arms=arms,
    reference='4 principles',
    diversity=True,
    figures=(
      rates_line(
        'After four rounds, by the number of principles (coverage held near 4 kinds)',
        **by_count,
        x_label='number of principles',
      ),
      rates_line(
        'After four rounds, by what a principle covers (four principles each)',
        **by_coverage,
        x_label='kinds of rule that a principle covers, of 8',
      ),
      {
        'kind': 'line',
        'group': 'harmful',
        'caption': 'Diversity of the last revisions',
        'x_label': 'number of principles',
        'y_label': 'diversity (1 - similarity)',
        'series': [{'name': 'diversity', 'metric': 'diversity', **by_count}],
      },
    ),
  )


def _arm(ids: tuple[str, ...]) -> Arm:
  found = [principle for principle in corpus.shipped() if principle.id in ids]
  scopes = [corpus.scope(principle) for principle in found]
  weights = [principle.weight for principle in found]
  covered = sum(w * len(s) for w, s in zip(weights, scopes, strict=True)) / sum(weights)
  facts = {
    'principles': len(ids),
    'coverage': round(covered, 2),
    'union': len(set().union(*scopes)),
  }
  return Arm({'constitution.ids': ids}, 'last', facts)
