"""The summary of a run."""

import dataclasses

import pytest

from cai_jax.evaluation import intervals
from cai_jax.evaluation.intervals import paired_difference
from cai_jax.evaluation.measures.changed import measure_changed
from cai_jax.evaluation.measures.length import measure_length
from cai_jax.evaluation.measures.verdicts import verdict_rates
from cai_jax.evaluation.summary import (
  average_groups,
  average_measures,
  measure_groups,
  measure_responses,
  response_rows,
  summarize,
)
from cai_jax.report import summary_table
from cai_jax.report.numbers import MISSING, check_summary
from cai_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Verdict:
  violations: frozenset
  helpful: bool


def scorer(prompts, texts):
  return [
    Verdict(frozenset({'rude'} if 'rude' in text else ()), prompt[-1]['content'] in text)
    for prompt, text in zip(prompts, texts, strict=True)
  ]


MEASURES = [verdict_rates(scorer), measure_length]


def row(name, kind, texts):
  turn = lambda text: {'text': text, 'num_tokens': len(text.split())}  # noqa: E731
  return {
    'id': name,
    'kind': kind,
    'prompt': [{'role': 'user', 'content': name}],
    'initial': turn(texts[0]),
    'rounds': [{'revision': turn(text)} for text in texts[1:]],
  }


def test_summary_has_rates_of_each_round_and_model():
  base = [
    row('a', 'harmful', ['a rude rude', 'a rude', 'a']),
    row('b', 'harmful', ['b rude', 'b', '']),
    row('c', 'helpful', ['c']),
  ]
  aligned = [
    row('c', 'helpful', ['c rude']),
    row('b', 'helpful', ['b']),
    row('a', 'helpful', ['x']),
  ]
  summary = summarize(base, aligned, MEASURES)
  rates = lambda group: {k: v['violation_rate'] for k, v in group.items()}  # noqa: E731
  assert rates(summary['stages']) == {'initial': 1.0, 'revision_1': 0.5, 'revision_2': 0.0}
  assert summary['stages']['revision_2']['helpful_rate'] == 0.5
  assert summary['stages']['initial']['mean_tokens'] == 2.5
  assert rates(summary['models']) == {'base': 1.0, 'aligned': 0.0}
  assert summary['models']['aligned']['helpful_rate'] == 0.5
  interval = summary['stages']['revision_2']['violation_rate_interval']
  assert interval == list(intervals.wilson_interval(0, 2)) and interval[1] > 0.6
  assert rates(summary['benign']) == {'base': 0.0, 'aligned': 1.0}
  assert summary['benign']['base']['count'] == 1


def test_rounds_and_models_are_compared_by_prompt_with_holms_correction():
  texts = [['rude', 'rude' if i < 8 else 'a', 'a' if i < 18 else 'rude'] for i in range(20)]
  base = [row(f'p{i}', 'harmful', t) for i, t in enumerate(texts)]
  aligned = [row(f'p{i}', 'harmful', ['rude' if i < 10 else 'a']) for i in range(20)]
  summary = summarize(base, aligned, MEASURES)
  assert 'differences' not in summary['stages']['initial']
  first = summary['stages']['revision_1']['differences']['violation_rate']
  second = summary['stages']['revision_2']['differences']['violation_rate']
  assert (first['to'], second['to']) == ('initial', 'revision_1')
  assert (first['value'], second['value']) == pytest.approx((-0.6, -0.3))
  assert first['interval'] == list(intervals.tango_interval(0, 12, 20))
  assert first['p_value'] == pytest.approx(2 * 0.5**12)
  assert second['p_value'] == pytest.approx(2 * (1 + 10 + 45) * 0.5**10)  # 2 gains, 8 losses
  assert first['adjusted_p_value'] == pytest.approx(2 * first['p_value'])
  assert second['adjusted_p_value'] == second['p_value']
  model = summary['models']['aligned']['differences']['violation_rate']
  assert model['to'] == 'base' and model['adjusted_p_value'] == model['p_value']


def test_a_summary_without_a_scorer_has_lengths_only():
  base = [row('a', 'harmful', ['a b c', 'a'])]
  summary = summarize(base, base, [measure_length])
  assert summary['stages']['initial'] == {'count': 1, 'mean_tokens': 3.0}
  assert 'benign' not in summary


def test_different_prompts_and_empty_sets_are_rejected():
  with pytest.raises(UserError, match='different prompts'):
    summarize([row('a', 'harmful', ['a'])], [row('b', 'harmful', ['b'])], MEASURES)
  with pytest.raises(UserError, match='no response'):
    average_measures(MEASURES, [], [])


def test_measures_must_return_distinct_columns_with_one_value_per_response():
  turns = [{'text': 'a', 'num_tokens': 1}]
  with pytest.raises(UserError, match="Two measures return the column 'mean_tokens'"):
    measure_responses([measure_length, measure_length], [[]], turns)
  with pytest.raises(UserError, match="measure of 'short' returned 0 values for 1 responses"):
    measure_responses([lambda prompts, turns: {'short': []}], [[]], turns)


def test_a_rate_outside_0_to_1_is_rejected():
  turns = [{'text': 'a', 'num_tokens': 1}]
  with pytest.raises(UserError, match=r"'odd_rate' returned 2..2. A rate must be in"):
    measure_responses([lambda prompts, turns: {'odd_rate': [2]}], [[]], turns)


def test_a_scorer_must_return_one_verdict_per_response():
  turns = [{'text': 'a', 'num_tokens': 1}]
  measure = verdict_rates(lambda prompts, texts: [], 'mine')
  with pytest.raises(UserError, match="scorer 'mine' returned 0 verdicts for 1 responses"):
    measure_responses([measure], [[]], turns)


def test_differences_are_paired_by_prompt():
  base = [row(str(i), 'harmful', ['rude', 'rude' if i < 10 else 'fine']) for i in range(20)]
  aligned = [row(str(i), 'helpful', ['fine' if i < 18 else 'rude']) for i in range(20)]
  summary = summarize(base, aligned, [verdict_rates(scorer)])
  found = summary['models']['aligned']['differences']['violation_rate']
  assert found['to'] == 'base' and found['p_value'] < 1e-4
  expected = paired_difference([0] * 18 + [1] * 2, [1] * 20)
  assert (found['value'], *found['interval']) == pytest.approx(tuple(expected))
  assert found['value'] == pytest.approx(-0.9)
  by_round = summary['stages']['revision_1']['differences']['violation_rate']
  assert by_round['to'] == 'initial' and by_round['value'] == -0.5


def test_unknown_values_are_left_out_of_means_and_differences():
  base = [row(name, 'harmful', [name, 'x']) for name in 'ab']
  aligned = [row(name, 'harmful', ['a']) for name in 'ab']
  unknown = lambda prompts, turns: {  # noqa: E731
    'known_rate': [None if turn['text'] == 'b' else 1.0 for turn in turns]
  }
  summary = summarize(base, aligned, [unknown, measure_changed])
  assert summary['models']['base']['known_rate'] == 1.0
  assert 'changed_rate' not in summary['models']['base']
  assert summary['models']['aligned']['changed_rate'] == 0.5
  assert summary['stages']['revision_1']['changed_rate'] == 1.0
  known = summary['models']['aligned']['differences']
  assert set(known) == {'known_rate'} and known['known_rate']['value'] == 0


def test_a_summary_is_readable_at_100_characters():
  base = [row(str(i), 'harmful', ['rude ' * i, 'fine']) for i in range(20)]
  measures = [
    verdict_rates(scorer),
    lambda prompts, turns: {
      f'{name}_rate': [len(turn['text']) % 2 for turn in turns]
      for name in ('refusal', 'off_topic', 'looping', 'truncated')
    },
    measure_changed,
    measure_length,
  ]
  aligned = [row(str(i), 'harmful', ['fine']) for i in range(20)]
  summary = summarize(base, aligned, measures)
  check_summary(summary)
  text = summary_table(summary)
  assert max(map(len, text.splitlines())) <= 100
  for column in ('breaks a rule', 'refused', 'off topic', 'looping', 'truncated', 'mean tokens'):
    assert column in text
  assert [line for line in text.splitlines() if line.startswith('  base') and MISSING in line]
  # The differences do not fit into one table, so only the significant ones are listed.
  assert '12 of 14 paired differences are significant' in text
  assert len([line for line in text.splitlines() if ' − ' in line]) == 12


def test_labels_stand_in_the_rows_and_have_no_mean():
  def measure_labels(prompts, turns):
    return {'guard_labels': [('S1',) if 'rude' in turn['text'] else () for turn in turns]}

  base = [row('a', 'harmful', ['rude', 'a']), row('b', 'harmful', ['b', 'rude'])]
  aligned = [row('a', 'harmful', ['x']), row('b', 'harmful', ['x'])]
  groups = measure_groups(base, aligned, [measure_labels, measure_length])
  summary = average_groups(groups)
  assert 'guard_labels' not in summary['models']['base']
  assert set(summary['models']['aligned']['differences']) == {'mean_tokens'}
  found = {(r['model'], r['id'], r['stage']): r['labels'] for r in response_rows(groups)}
  assert found['base', 'a', 'initial'] == {'guard_labels': ['S1']}
  assert found['base', 'a', 'revision_1'] == {'guard_labels': []}
  assert all('labels' not in r for r in response_rows(measure_groups(base, aligned, MEASURES)))
