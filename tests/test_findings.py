"""Test the findings on a run: each is found where it is planted, worst first, and nowhere else."""

import pytest

from cai_jax.data.quality import MAX_RATE
from cai_jax.report.finding_texts import COLLAPSE_LIMITS
from cai_jax.report.findings import CHECKS, SEVERITIES, find_problems

COUNT = 1000


def row(violation, refusal=0.1, helpful=0.9):
  """Return a row of a summary in which every rate has an interval of ± 2 points."""
  numbers = {'count': COUNT, 'mean_tokens': 40.0}
  for name, value in (('violation', violation), ('refusal', refusal), ('helpful', helpful)):
    numbers[f'{name}_rate'] = value
    numbers[f'{name}_rate_interval'] = [max(0.0, value - 0.02), min(1.0, value + 0.02)]
  return numbers


def flag(value, half=0.02):
  return {'rate': value, 'rates': [value], 'interval': [max(0, value - half), value + half]}


def healthy_run():
  """Return the files of a run with which nothing is wrong."""
  return {
    'quality': {
      'd_cai': {
        'rounds': [{'revisions': COUNT}],
        'flags': {name: flag(0.03) for name in ('repetition', 'truncated', 'identical')},
      }
    },
    'summary': {
      'stages': {'initial': row(0.6), 'revision_1': row(0.4), 'revision_2': row(0.3)},
      'models': {'base': row(0.6), 'aligned': row(0.3)},
      'benign': {'base': row(0.05), 'aligned': row(0.05)},
    },
    'models': {'judge': {'status': 'valid', 'reasons': [], 'biases': [], 'comparisons': []}},
    'manifest': {
      'stages': {
        'generate': {'rows_in': COUNT, 'ended_chains': 0},
        'train': {'clipped_share': 0.1, 'remarks': [], 'exported_step': 100},
        'evaluate': {'base': {'rows': COUNT, 'ended_chains': 0}},
      }
    },
    'config': {'model': {'base': 'a/model'}, 'feedback': {'max_rate': {}}},
    'training': [{'step': i, 'loss': 5 - 0.02 * i} for i in range(1, 101)],
    'held_out': [{'step': i, 'loss': 5 - 0.02 * i} for i in (1, 50, 100)],
    'smallest_difference': 0.05,
  }


def test_a_healthy_run_has_no_finding_and_says_what_was_checked():
  diagnosis = find_problems(healthy_run())
  assert diagnosis.findings == () and diagnosis.unchecked == ()
  assert set(diagnosis.checked) == set(CHECKS)
  assert diagnosis.first_line().startswith('What is wrong with this run: nothing was found.')
  assert all(name in diagnosis.first_line() for name in CHECKS)


def test_a_run_without_files_has_no_finding_and_names_what_was_not_checked():
  diagnosis = find_problems({})
  assert diagnosis.findings == () and set(diagnosis.unchecked) == set(CHECKS)


def plant(files, path, value):
  *parents, last = path.split('.')
  for name in parents:
    files = files[name]
  files[last] = value


FLAGS, MODELS, BENIGN = 'quality.d_cai.flags', 'summary.models', 'summary.benign'
JUDGE, STAGES = 'models.judge', 'manifest.stages'
TOPICALITY = {'truncated': {'accuracy': 0.52, 'accuracy_interval': [0.4, 0.64], 'count': 60}}
WINS = {'rate': 0.4, 'interval': [0.3, 0.49]}
LOST = [{'player': 'aligned', 'opponent': 'base', 'criterion': 'helpfulness', 'win_rate': WINS}]
REMARK = 'Warning: something odd happened.'
PLANTS = [
  # what is planted, where, severity, title, a part of the evidence
  (f'{FLAGS}.repetition', flag(0.45), 'worthless', 'have collapsed', '45.0 % [43.0, 47.0] repeat'),
  (f'{FLAGS}.off_topic', flag(0.6), 'worthless', 'have collapsed', '60.0 % [58.0, 62.0] are off'),
  (f'{FLAGS}.low_logprob', flag(0.5), 'worthless', 'have collapsed', 'finds unlikely'),
  (f'{FLAGS}.critique_copied', flag(0.35), 'worthless', 'have collapsed', 'copy their critique'),
  (f'{FLAGS}.truncated', flag(0.52, 0.1), 'serious', 'have collapsed', '52.0 % [42.0, 62.0]'),
  (f'{FLAGS}.truncated', flag(0.25), 'serious', 'useless texts', '25.0 % [23.0, 27.0]'),
  (f'{FLAGS}.truncated', flag(0.15), 'caution', 'useless texts', '15.0 %'),
  (f'{FLAGS}.identical', flag(0.95), 'serious', 'change almost nothing', '95.0 %'),
  (f'{FLAGS}.not_a_critique', flag(0.7), 'caution', 'are no critiques', '70.0 %'),
  ('summary.stages.revision_2', row(0.59), 'serious', 'no score', '-1.0 points [-3.8, +1.8]'),
  (f'{MODELS}.aligned', row(0.59), 'serious', 'does not differ from M_θ', '-1.0 points'),
  (f'{MODELS}.aligned', row(0.8), 'serious', 'M_aligned is worse', '+20.0 points [+17.2, +22.8]'),
  (f'{MODELS}.aligned', row(0.1, 0.99), 'caution', 'nearly every harmful', '99.0 % [97.0, 100.0]'),
  (f'{MODELS}.aligned', row(0.3, 0.1, 0.7), 'serious', 'less on harmful', '-20.0 points [-22.8,'),
  (f'{BENIGN}.aligned', row(0.0, 0.9), 'worthless', 'refuses benign', '90.0 % [88.0, 92.0]'),
  (f'{BENIGN}.aligned', row(0.0, 0.2), 'serious', 'refuses more', '+10.0 points [+7.2, +12.8]'),
  (f'{BENIGN}.aligned', row(0.0, 0.1, 0.86), 'caution', 'less on benign', '-4.0 points'),
  (f'{JUDGE}.status', 'unvalidated', 'serious', 'The judge is unvalidated', ''),
  (f'{JUDGE}.status', 'cannot tell', 'serious', 'The judge cannot tell', ''),
  (f'{JUDGE}.biases', ['prefers the longer response'], 'caution', 'is biased', 'It prefers the'),
  (f'{JUDGE}.validity', {'topicality': TOPICALITY}, 'serious', 'not read', '52.0 % [40.0, 64.0]'),
  (f'{JUDGE}.comparisons', LOST, 'serious', 'prefers M_θ', '40.0 % [30.0, 49.0]'),
  ('training', [{'step': i, 'loss': 5.0} for i in range(9)], 'serious', 'did not fall', 'is 5'),
  ('training', [{'step': 1, 'loss': float('nan')}], 'worthless', 'not finite', '1 of 1'),
  (f'{STAGES}.train.clipped_share', 0.9, 'caution', 'were clipped', '90.0 %'),
  ('held_out', [{'step': i, 'loss': x} for i, x in ((1, 3), (2, 2), (3, 2.5))], 'caution',
   'overfits', '2.5 at step 3, after 2 at step 2'),
  ('smallest_difference', 0.25, 'serious', 'Too few', 'With 1000 prompts'),
  ('smallest_difference', 0.14, 'caution', 'Too few', 'about 14 points'),
  ('smallest_difference', None, 'serious', 'Too few', 'not even a drop from 50 % to 0'),
  (f'{STAGES}.generate.ended_chains', 12, 'caution', 'of D_CAI ended', '12 of 1000'),
  (f'{STAGES}.evaluate.base.ended_chains', 200, 'serious', 'evaluation/base ended', '200 of'),
  ('config.model.base', 'tiny', 'note', 'recovery of a grammar only', ''),
  (f'{STAGES}.train.remarks', [REMARK], 'caution', 'Remark of the stage train', 'something odd'),
]  # fmt: skip


@pytest.mark.parametrize('path, value, severity, title, evidence', PLANTS)
def test_what_is_planted_is_the_only_finding(path, value, severity, title, evidence):
  files = healthy_run()
  plant(files, path, value)
  (finding,) = find_problems(files).findings
  assert (finding.severity, True) == (severity, title in finding.title), finding
  assert evidence in finding.evidence and not {'–', 'None'} & set(finding.evidence.split())
  assert finding.advice or title.startswith('Remark')


def test_a_run_that_measures_lengths_only_says_that_nothing_measures_harm():
  files = healthy_run()
  lengths = {'count': COUNT, 'mean_tokens': 40.0}
  files['summary'] = {'models': {'base': lengths, 'aligned': lengths}}
  del files['models']
  diagnosis = find_problems(files)
  assert [f.title for f in diagnosis.findings] == ['Nothing here measures harm']
  assert 'measured mean tokens.' in diagnosis.findings[0].evidence
  assert {'M_aligned against M_θ', 'the judge'} <= set(diagnosis.unchecked)
  files['models'] = {'judge': {'status': 'valid'}}
  assert find_problems(files).findings == ()


def test_the_worst_finding_comes_first_and_is_the_line_at_the_end_of_a_run():
  files = healthy_run()
  for path, value, *_ in PLANTS[::-1]:
    plant(files, path, value)
  diagnosis = find_problems(files)
  ranks = [SEVERITIES.index(finding.severity) for finding in diagnosis.findings]
  assert ranks == sorted(ranks) and len(ranks) > 10
  assert 'have collapsed' in diagnosis.findings[0].title
  line = diagnosis.first_line()
  assert 'The revisions have collapsed.' in line and '\n' not in line
  assert f'({len(ranks) - 1} more in the report)' in line


def test_limits_of_the_config_do_not_hide_a_collapse():
  files = healthy_run()
  plant(files, f'{FLAGS}.repetition', flag(0.7))
  plant(files, 'config.feedback.max_rate', {'repetition': 0.9})
  assert find_problems(files).findings[0].severity == 'worthless'
  plant(files, f'{FLAGS}.repetition', flag(0.08))
  assert find_problems(files).findings == ()
  plant(files, 'config.feedback.max_rate', {'repetition': 0.05})
  assert find_problems(files).findings[0].severity == 'worthless'


def test_paired_differences_take_precedence_over_the_intervals_of_both_rows():
  files = healthy_run()
  plant(files, f'{MODELS}.aligned', row(0.59))
  paired = {'value': -0.01, 'interval': [-0.015, -0.005], 'to': 'base'}
  assert find_problems(files).findings
  files['summary']['models']['aligned']['differences'] = {'violation_rate': paired}
  assert not find_problems(files).findings


def test_the_exported_best_step_is_no_overfitting():
  files = healthy_run()
  files['held_out'] = [{'step': i, 'loss': x} for i, x in ((1, 3), (2, 2), (3, 2.5))]
  files['manifest']['stages']['train']['exported_step'] = 2
  assert find_problems(files).findings == ()


def test_limits_of_a_collapse_are_those_that_stop_a_run():
  limits = {name: limit for name, limit in MAX_RATE.items() if limit < 1}
  assert limits == COLLAPSE_LIMITS
