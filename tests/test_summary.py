"""The summary of a run."""

import dataclasses

import pytest

from cai_jax.evaluation import intervals
from cai_jax.evaluation.measures.length import measure_length
from cai_jax.evaluation.measures.verdicts import verdict_rates
from cai_jax.evaluation.summary import average_measures, measure_responses, summarize
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
