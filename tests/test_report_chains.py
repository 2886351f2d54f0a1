"""Test the chains of a report: held-out answers side by side, with flags, scores and verdicts."""

import json
import types

import pytest

from cai_jax.data import d_cai
from cai_jax.evaluation.power import smallest_difference
from cai_jax.pipeline import report_chains, stage_report
from cai_jax.runtime.errors import UserError


def turn(text):
  return {'text': text, 'finish_reason': 'stop', 'logprob': -1.5, 'num_tokens': 3}


def write_dataset(folder, texts, rounds=0):
  """Write a dataset with a row of a harmful prompt per id and text."""
  rows = [
    {
      'id': name,
      'kind': 'harmful',
      'prompt': [{'role': 'user', 'content': f'Ask {name}'}],
      'metadata': '{}',
      'initial': turn(text),
      'rounds': [
        {'principle': 'p', 'critique': turn('Hm.'), 'revision': turn(f'{text} better {i}')}
        for i in range(rounds)
      ],
      'logprobs': [0.5],
      'seed': 1,
      'model': 'm',
      'critique_model': 'm',
      'revision_model': 'm',
      'constitution': 'c',
    }
    for name, text in texts.items()
  ]
  folder.mkdir(parents=True)
  d_cai.write_shard(folder, 0, rows)
  d_cai.write_metadata(folder, [len(rows)])


def write_lines(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def find_rudeness(prompts, texts):
  return [types.SimpleNamespace(violations={'rude'} if 'rude' in t else set()) for t in texts]


def score(model, name, stage='initial', **columns):
  return {'model': model, 'id': name, 'stage': stage, 'columns': columns}


def test_answers_stand_side_by_side_with_their_marks(tmp_path):
  folder = tmp_path / 'evaluation'
  write_dataset(folder / 'base', {'a': 'rude', 'b': 'mild', 'c': 'lost'}, rounds=1)
  write_dataset(folder / 'aligned', {'a': 'kind', 'b': 'rude too'})
  write_dataset(folder / 'system_prompt', {'b': 'plain'})
  write_dataset(folder / 'candidates' / 'best_of_n', {'a': 'one of many', 'b': 'one of many'})
  rows = [
    score('base', 'a', looping_rate=1.0, topic=-0.123456, mean_tokens=3.0),
    score('base', 'a', 'revision_1', looping_rate=0.0, topic=None),
    score('aligned', 'a', looping_rate=0.0, helpful_rate=1.0)
    | {'labels': {'guard_labels': ['S1', 'S10'], 'other_labels': []}},
  ]
  write_lines(folder / 'rows.jsonl', rows)
  items = [{'id': 'a', 'log_odds': [2.0, 1.0]}, {'id': 'b', 'log_odds': [-3.0, float('nan')]}]
  comparison = {'player': 'aligned', 'opponent': 'base', 'criterion': 'harmlessness'}
  judge = {'status': 'unvalidated', 'comparisons': [comparison | {'items': items}]}
  first, second = report_chains.read_answers(folder, judge, find_rudeness, 10)
  assert (first['id'], second['id']) == ('a', 'b')  # aligned has no answer to c
  assert first['initial']['flags'] == ['looping']
  assert first['initial']['scores'] == {'looping_rate': 1.0, 'topic': -0.1235}
  assert first['rounds'][0]['revision']['flags'] == []
  assert first['answers']['aligned']['text'] == 'kind'
  assert first['answers']['aligned']['flags'] == ['guard: S1', 'guard: S10']
  assert first['answers']['aligned']['scores'] == {'looping_rate': 0.0, 'helpful_rate': 1.0}
  assert first['violations'] == [['rude'], ['rude']]
  assert first['answers']['aligned']['violations'] == []
  assert list(second['answers']) == ['aligned', 'system_prompt']  # candidates are no model's
  assert second['answers']['aligned']['violations'] == ['rude']
  name = 'harmlessness: aligned against base (unvalidated judge)'
  assert (first['verdicts'], second['verdicts']) == ({name: 1.5}, {name: -3.0})
  assert len(report_chains.read_answers(folder, None, None, 1)) == 1


def test_d_cai_has_the_flags_of_its_rows(tmp_path):
  write_dataset(tmp_path / 'd_cai', {'a': 'x', 'b': 'y'}, rounds=2)
  rows = [
    {'id': 'a', 'round': -1, 'flags': []},
    {'id': 'a', 'round': 1, 'flags': ['repetition'], 'scores': {'mean_logprob': -1.0}},
  ]
  write_lines(tmp_path / report_chains.QUALITY_ROWS, rows)
  first, second = report_chains.read_d_cai(tmp_path / 'd_cai', tmp_path, None, 10)
  assert first['initial']['flags'] == [] and 'scores' not in first['initial']
  revisions = [step['revision'] for step in first['rounds']]
  assert 'flags' not in revisions[0] and revisions[1]['flags'] == ['repetition']
  assert revisions[1]['scores'] == {'mean_logprob': -1.0}
  assert 'flags' not in second['initial']


@pytest.mark.parametrize('line', [b'{"id": "a"}\n', b'{\n', b'[1]\n', b'{"id": 1, "round": 0}\n'])
def test_a_damaged_line_is_named(tmp_path, line):
  path = tmp_path / report_chains.QUALITY_ROWS
  path.write_bytes(b'{"id": "a", "round": 0, "flags": []}\n' + line)
  with pytest.raises(UserError, match='quality_rows.jsonl, line 2'):
    report_chains.read_quality_marks(path)


def test_a_run_of_few_prompts_is_told_what_they_can_show(tmp_path):
  run = types.SimpleNamespace(workdir=tmp_path, values={})
  path = tmp_path / 'evaluation' / 'summary.json'
  path.parent.mkdir()
  evidence = {}
  for count in (4, 60, 100_000):
    path.write_text(json.dumps({'models': {'base': {'mean_tokens': 9.0, 'count': count}}}))
    findings = stage_report.diagnose(run, {'stages': {}}).findings
    evidence[count] = [f.evidence for f in findings if f.title == 'Too few held-out prompts']
  assert 'not even a drop from 50 % to 0' in evidence[4][0]
  assert f'about {100 * smallest_difference(60, 0.5):.0f} points' in evidence[60][0]
  assert evidence[100_000] == []


def test_verdicts_say_what_their_judge_is_worth():
  comparison = {'player': 'aligned', 'opponent': 'base', 'criterion': 'helpfulness'}
  comparison['items'] = [{'id': 'a', 'log_odds': [1.0]}]
  names = {}
  for status in ('valid', 'unvalidated', 'cannot tell'):
    judge = {'status': status, 'comparisons': [comparison]}
    ((names[status], _),) = report_chains.collect_verdicts(judge)['a'].items()
  plain = 'helpfulness: aligned against base'
  assert names['valid'] == plain
  assert names['unvalidated'] == f'{plain} (unvalidated judge)'
  assert names['cannot tell'] == f'{plain} (the judge cannot tell)'
