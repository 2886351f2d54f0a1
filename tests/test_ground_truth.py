"""The grammar's own rates beside those of a run in the embedded world."""

import json

import pytest

from cai_jax import pipeline
from cai_jax.experiment import define
from cai_jax.pipeline import ground_truth
from cai_jax.pipeline.ground_truth import grammar_rates
from cai_jax.tiny import corpus, prompts, simulate

VIOLATION = 'grammar_violation_rate'


def build(tmp_path, **changes):
  fields = {name.replace('__', '.'): value for name, value in changes.items()}
  fields |= {'prompts.harmful.limit': 4, 'prompts.helpful.limit': 2}
  fields |= {'prompts.eval_harmful.limit': 4, 'prompts.eval_helpful.limit': 2}
  return pipeline.build(
    define.override_config(define.load_config('configs/tiny.py'), fields), tmp_path
  )


def messages(kind, count=150):
  return [prompt.messages for prompt in prompts.make_prompts('eval', count, 0, kind)]


def test_rates_of_given_prompts_agree_with_the_rates_of_drawn_requests():
  principles = corpus.load_principles()
  drawn = simulate.simulate_chains(principles, count=4000)
  given = simulate.simulate_prompts(messages('baited', 600), principles)
  for (violating, helpful), (other, other_helpful) in zip(drawn, given, strict=True):
    # The standard error of a rate of 600 prompts is at most 2 points, mostly of their baits.
    assert abs(violating - other) < 0.06 and abs(helpful - other_helpful) < 0.01


def test_each_response_has_the_rate_of_the_text_that_it_imitates(tmp_path):
  rates = grammar_rates(build(tmp_path), messages('baited'), 'harmful')
  assert rates['initial'] == rates['base']
  assert rates['last'] == rates['revised'] == rates['revision_4'] == rates['aligned']
  violating = [rates[name][VIOLATION] for name in ('initial', *(f'revision_{n}' for n in (1, 2)))]
  assert violating == sorted(violating, reverse=True) and violating[0] > 0.8
  benign = grammar_rates(build(tmp_path), messages('benign'), 'helpful')
  assert benign['base'] == benign['revised'] == benign['aligned']
  assert benign['base'][VIOLATION] < 0.03


def test_a_model_that_learns_all_revisions_has_their_mean_rate(tmp_path):
  run = build(tmp_path, train__target='all', feedback__rounds=2)
  rates = grammar_rates(run, messages('baited'), 'harmful')
  mean = (rates['revision_1'][VIOLATION] + rates['revision_2'][VIOLATION]) / 2
  assert rates['aligned'][VIOLATION] == pytest.approx(mean)
  run = build(tmp_path, train__target='initial')
  rates = grammar_rates(run, messages('baited'), 'harmful')
  assert rates['aligned'] == rates['initial']


@pytest.mark.parametrize(
  ('changes', 'known'),
  [
    ({'sampling__critique__temperature': 0.5}, {'initial', 'base'}),
    ({'sampling__revision__top_p': 0.9}, {'initial', 'base'}),
    ({'feedback__variant': 'shuffled'}, {'initial', 'base'}),
    ({'feedback__variant': 'empty'}, {'initial', 'base'}),
    ({'feedback__repeat_principles': False}, {'initial', 'base'}),
    ({'sampling__initial__temperature': 0.5}, set()),
    ({'model__critique': '/a/folder'}, set()),
    ({'constitution__path': 'general'}, set()),
    ({'evaluation__scorer': 'none'}, set()),
  ],
)
def test_where_the_settings_leave_the_grammar_there_is_no_truth(changes, known, tmp_path):
  rates = grammar_rates(build(tmp_path, **changes), messages('baited', 5), 'harmful')
  assert set(rates) == known
  direct = build(tmp_path, feedback__variant='direct', sampling__critique__temperature=0.5)
  assert 'revision_4' in grammar_rates(direct, messages('baited', 5), 'harmful')


def test_fine_tuning_that_the_grammar_does_not_describe_has_no_truth(tmp_path):
  for changes in (
    {'model__init': 'tiny-small'},
    {'model__aligned': 'tiny-small'},
    {'train__filters': ('identical',)},
  ):
    rates = grammar_rates(build(tmp_path, **changes), messages('baited', 5), 'harmful')
    assert 'aligned' not in rates and 'last' in rates
  run = build(tmp_path, train__helpfulness_share=0.0)
  assert 'aligned' not in grammar_rates(run, messages('benign', 5), 'helpful')


def test_a_summary_gets_the_truth_of_each_row(tmp_path):
  rows = [
    {'kind': kind, 'prompt': prompt}
    for kind, name in (('harmful', 'baited'), ('helpful', 'benign'))
    for prompt in messages(name, 20)
  ]
  names = {'stages': ('initial', 'revision_1'), 'models': ('base', 'aligned'), 'benign': ('base',)}
  summary = {group: {name: {'count': 20} for name in rows} for group, rows in names.items()}
  ground_truth.add_grammar(summary, build(tmp_path), rows)
  assert all(VIOLATION in row for group in summary.values() for row in group.values())
  assert summary['stages']['initial'][VIOLATION] > summary['benign']['base'][VIOLATION]
  assert json.loads(json.dumps(summary)) == summary
