"""Does the number of principles matter, or what they cover? Constitutions of 1 to 16 principles.

Paper:     Bai et al. 2022, Figure 6 and section 3.4: the number of principles has no significant
           effect on harmlessness. The figure's caption says that more principles give more diverse
           responses; the section says that this was expected and not studied quantitatively
Command:   python -m cai_jax.experiment --experiment=experiments/principles.py \\
             --workdir=runs/lab
Hardware:  two CPU cores; 5 minutes, 1.4 GB
Arms:      1, 2, 4, 8 and 16 principles, with the mean coverage held near 4 of the 8 kinds of rule;
           and 4 principles that cover 1, 4 or 8 kinds each. `coverage` is the mean number of kinds
           that a sampled principle names; `union` is the number that any of them names
Expected:  in the embedded world, a principle finds exactly the kinds that it names, so coverage
           decides by construction: the violations left after four rounds are 65, 17 and 3 % for 1,
           4 and 8 kinds per principle. At equal coverage, 2 to 16 principles whose union is all
           kinds leave 16 to 20 %; a single principle, which never mentions four of the kinds,
           leaves 42 % (the grammar 54 %). Diversity hardly changes (RESULTS.md)
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


def get_experiment() -> Experiment:
  """Return the experiment: sets of principles, scored after the last round."""
  arms = {f'{count} principles': _arm(ids) for count, ids in COUNTS.items()}
  arms['1 principle'] = arms.pop('1 principles')
  arms = {'initial': Arm(response='initial'), '1 principle': arms.pop('1 principle'), **arms}
  narrow, general = '4 narrow principles', '4 general principles'
  arms |= {narrow: _arm(NARROW[:4]), general: _arm(GENERAL)}
  count_arms = ['1 principle', *(f'{count} principles' for count in COUNTS if count > 1)]
  coverage_arms = [narrow, '4 principles', general]
  by_count = {'arms': count_arms, 'x': list(COUNTS)}
  by_coverage = {
    'arms': coverage_arms,
    'x': [arms[name].facts['coverage'] for name in coverage_arms],
  }
  return Experiment(
    arms=arms,
    reference='4 principles',
    diversity=('diversity',),
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
  principles = [principle for principle in corpus.load_principles() if principle.id in ids]
  scopes = [corpus.find_scope(principle) for principle in principles]
  weights = [principle.weight for principle in principles]
  coverage = sum(w * len(s) for w, s in zip(weights, scopes, strict=True)) / sum(weights)
  facts = {
    'principles': len(ids),
    'coverage': round(coverage, 2),
    'union': len(set().union(*scopes)),
  }
  return Arm({'constitution.ids': ids}, 'last', facts)
