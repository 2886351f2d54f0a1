"""Results of lm-eval and inspect beside ours."""

import copy
import json
import os

import pytest

from cai_jax.evaluation.external import read_results
from cai_jax.pipeline import import_results
from cai_jax.pipeline.stage_report import read_summary
from cai_jax.report import summary_table
from cai_jax.runtime.errors import UserError

# In the form that lm-eval 0.4.13 writes to results_DATE.json, without what is not read.
LM_EVAL = {
  'results': {
    'some_choice': {
      'name': 'some_choice',
      'alias': 'some_choice',
      'sample_len': 300,
      'acc,none': 0.5,
      'acc_stderr,none': 0.01,
      'acc_norm,none': 0.25,
      'acc_norm_stderr,none': 'N/A',
      'exact_match,none': 0.0,
      'exact_match_stderr,none': 0.0,
    },
    'math': {'alias': 'math', 'exact_match,strict-match': 0.125, 'exact_match,flexible': 0.25},
  },
  'configs': {},
  'versions': {'some_choice': 'Yaml'},
  'n-samples': {'some_choice': {'original': 1000, 'effective': 300}},
}
# In the form that inspect-ai 0.3.285 writes with --log-format=json, without what is not read.
INSPECT = {
  'version': 2,
  'status': 'success',
  'eval': {'task': 'inspect_evals/xstest', 'task_args_passed': {'subset': 'unsafe'}},
  'plan': {},
  'results': {
    'scores': [
      {
        'name': 'model_graded_qa',
        'scored_samples': 200,
        'metrics': {
          'refusal_rate': {'name': 'refusal_rate', 'value': 62.5, 'params': {}},
        },
      },
    ]
  },
}
RATE = {'violation_rate': 0.5, 'violation_rate_interval': [0.25, 0.75], 'count': 8}


@pytest.fixture
def run(tmp_path):
  folder = tmp_path / 'run'
  (folder / 'evaluation').mkdir(parents=True)
  summary = {'stages': {'initial': RATE}, 'models': {'base': RATE, 'aligned': RATE}}
  write(folder / 'evaluation' / 'summary.json', summary)
  return folder


def write(path, content):
  path.write_text(json.dumps(content))
  return str(path)


def test_lm_evals_metrics_are_read(tmp_path):
  program, metrics = read_results(write(tmp_path / 'results.json', LM_EVAL))
  assert program == 'lm-eval'
  accuracy, normalized, exact, strict, flexible = metrics
  assert (accuracy.title, accuracy.value, accuracy.count) == ('some choice: acc', 0.5, 300)
  assert accuracy.interval == pytest.approx((0.4804, 0.5196), abs=1e-5)
  assert normalized.interval is None and normalized.value == 0.25
  assert exact.interval is None and exact.value == 0  # all samples agree
  assert (strict.title, strict.count) == ('math: exact match (strict-match)', None)
  assert flexible.name == 'exact_match (flexible)'


def test_inspects_metrics_are_read(tmp_path):
  log = copy.deepcopy(INSPECT)
  program, (metric,) = read_results(write(tmp_path / 'log.json', log))
  assert program == 'inspect' and metric.count == 200
  assert (metric.title, metric.value) == ('xstest subset=unsafe: refusal rate', 62.5)
  metrics = {
    'accuracy': {'name': 'accuracy', 'value': 0.5, 'params': {}},
    'stderr': {'name': 'stderr', 'value': 0.1, 'params': {}},
  }
  log['results']['scores'].append({'name': 'match', 'scored_samples': 3, 'metrics': metrics})
  _, metrics = read_results(write(tmp_path / 'log.json', log))
  assert [m.name for m in metrics] == ['model_graded_qa refusal_rate', 'match accuracy']
  log['eval']['task_args_passed']['scorer_model'] = None
  for bound, named in (({'model': 'a/b'}, 'a/b'), ([{'model': 'a/b'}, {'model': 'c'}], 'a/b,c')):
    log['eval']['model_roles'] = {'grader': bound}
    _, (metric, _) = read_results(write(tmp_path / 'log.json', log))
    assert metric.task == f'xstest subset=unsafe grader={named}'
  assert metrics[1].interval == pytest.approx((0.304, 0.696), abs=1e-3)


def test_imported_numbers_stand_beside_ours(run, tmp_path):
  files = [write(tmp_path / 'a.json', LM_EVAL), write(tmp_path / 'b.json', INSPECT)]
  import_results.import_results(str(run), files, 'aligned')
  import_results.import_results(str(run), files[:1], 'base')
  summary = read_summary(run / 'evaluation' / 'summary.json')
  assert summary['models']['base']['some choice: acc'] == 0.5
  assert summary['models']['aligned']['violation_rate'] == 0.5
  text = summary_table(summary)
  assert 'xstest subset=unsafe: refusal rate' in text
  rows = {
    name: ' '.join(line for line in text.splitlines() if line.strip().startswith(name))
    for name in ('aligned', 'base', 'initial')
  }
  assert '62.5' in rows['aligned'] and '62.5' not in rows['base'] + rows['initial']
  assert '0.500 [0.480, 0.520]' in rows['aligned'] and '0.500 [0.480, 0.520]' in rows['base']


def test_a_number_that_is_imported_again_is_replaced(run, tmp_path):
  import_results.import_results(str(run), [write(tmp_path / 'a.json', INSPECT)], 'base')
  again = json.dumps(INSPECT).replace('62.5', 'NaN')
  (tmp_path / 'a.json').write_text(again)
  import_results.import_results(str(run), [str(tmp_path / 'a.json')], 'base')
  summary = read_summary(run / 'evaluation' / 'summary.json')
  assert summary['models']['base']['xstest subset=unsafe: refusal rate'] is None


def test_new_results_make_the_report_stale(run, tmp_path):
  assert not import_results.has_new_results(run)
  import_results.import_results(str(run), [write(tmp_path / 'a.json', INSPECT)], 'base')
  (run / 'report.html').write_text('')
  os.utime(run / 'evaluation' / import_results.IMPORTED, (1, 1))
  assert not import_results.has_new_results(run)
  os.utime(run / 'report.html', (0, 0))
  assert import_results.has_new_results(run)


def test_what_cannot_be_imported_is_refused(run, tmp_path):
  good = write(tmp_path / 'good.json', INSPECT)
  cases = [
    ({'a': 1}, 'They are .*inspect.*lm-eval'),
    (INSPECT | {'status': 'error'}, "status 'error'"),
    (INSPECT | {'results': {'scores': [{'metrics': {}}]}}, "key 'name'"),
    (INSPECT | {'results': {'scores': []}}, 'no metric'),
    (LM_EVAL | {'results': {'x': 3}}, 'results.x is 3'),
  ]
  for content, message in cases:
    with pytest.raises(UserError, match=message):
      read_results(write(tmp_path / 'bad.json', content))
  with pytest.raises(UserError, match='inspect log convert'):
    read_results(tmp_path / 'log.eval')
  with pytest.raises(UserError, match='The models of this run are base, aligned'):
    import_results.import_results(str(run), [good], 'other')
  with pytest.raises(UserError, match='both have'):
    import_results.import_results(str(run), [good, good], 'base')
  with pytest.raises(UserError, match='evaluate stage is done'):
    import_results.import_results(str(tmp_path), [good], 'base')
  assert not (run / 'evaluation' / import_results.IMPORTED).exists()
