"""Preference data: the forms that are read and written."""

import json
import math

import pytest

from cai_jax.data import d_cai, preferences
from cai_jax.data.preferences import (
  Comparison,
  JudgedResponse,
  judge_both,
  read_comparisons,
  read_judged,
  write_comparisons,
  write_judged,
  write_preferences,
)
from cai_jax.runtime.errors import UserError
from tests.preference_files import (
  ASK,
  BLUE,
  GREEN,
  PAIR,
  TEXTS,
  make_row,
  texts,
  transcript,
  write,
  write_d_cai,
)


def test_pairs_without_a_preference_are_left_out_and_counted(tmp_path):
  rows = [
    make_row('a', 'x', 'y', 'z'),
    make_row('b', 'x', 'y', 'x'),
    make_row('c', 'x', ''),
    make_row('d', 'x'),
  ]
  counts = write_preferences(tmp_path / 'p.jsonl', rows)
  assert counts == {'written': 1, 'identical': 1, 'empty': 1, 'not_revised': 1}
  (line,) = (tmp_path / 'p.jsonl').read_text().splitlines()
  assert json.loads(line) == {
    'id': 'a',
    'prompt': [{'role': 'user', 'content': 'hi a'}],
    'chosen': [{'role': 'assistant', 'content': 'z'}],
    'rejected': [{'role': 'assistant', 'content': 'x'}],
  }
  write_preferences(tmp_path / 'p.jsonl', [rows[0], make_row('e', 'x', 'y', finish='length')])
  lines = (tmp_path / 'p.jsonl').read_text().splitlines()
  assert [json.loads(line)['truncated'] for line in lines] == [[False, False], [True, False]]


def test_a_nul_that_a_model_wrote_ends_no_run(tmp_path):
  rows = [make_row('a', 'x', 'y\0'), make_row('b', 'x', 'y')]
  assert write_preferences(tmp_path / 'p.jsonl', rows)['written'] == 2
  assert json.loads((tmp_path / 'p.jsonl').read_text().splitlines()[0])['chosen'][0] == {
    'role': 'assistant',
    'content': 'y\0',
  }
  pairs = read_comparisons(write_d_cai(tmp_path / 'd_cai', rows), 'd_cai')
  assert pairs.counts == {'rows': 2, 'kept': 1, 'dropped': {'nul_character': 1}}


# Forms.


@pytest.mark.parametrize('name', ['p.jsonl', 'p.jsonl.gz', 'p.json'])
def test_every_format_of_trl_is_read(tmp_path, name):
  whole = {'chosen': [ASK, BLUE], 'rejected': [ASK, GREEN]}
  plain = {'prompt': ASK['content'], 'chosen': ' It is blue.', 'rejected': 'It is green.\n'}
  rows = [
    PAIR,
    whole,
    plain,
    {**plain, 'prompt': transcript(ASK['content'], '').rstrip()},
    {**whole, 'prompt': ASK['content'], 'prompt_id': 'x', 'messages': [ASK, BLUE]},  # UltraFeedback
    {'chosen': transcript(*_contents(ASK, BLUE)), 'rejected': transcript(*_contents(ASK, GREEN))},
  ]
  rows = [{'id': i, **row} for i, row in enumerate(rows)]
  for i, row in enumerate(rows):
    path = write(tmp_path / f'{i}-{name}', [json.dumps([row]) if name == 'p.json' else row])
    (pair,) = read_comparisons(path)
    assert texts(pair) == TEXTS and pair.id == str(i)
    assert (pair.probability, pair.margin, pair.truncated) == (1, None, (False, False))


def _contents(*messages):
  return [message['content'] for message in messages]


def test_files_with_a_byte_order_mark_windows_line_ends_and_blank_lines_are_read(tmp_path):
  path = write(tmp_path / 'p.jsonl', [PAIR, '', '   '], newline='\r\n', mark='\ufeff')
  assert [texts(pair) for pair in read_comparisons(path)] == [TEXTS]


def test_a_parquet_file_is_read(tmp_path):
  pa = pytest.importorskip('pyarrow')
  pq = pytest.importorskip('pyarrow.parquet')
  scores = {'score_chosen': [8.5], 'score_rejected': [4.0]}
  table = pa.table({name: [value] for name, value in PAIR.items()} | scores)
  pq.write_table(table, tmp_path / 'p.parquet')
  (pair,) = read_comparisons(tmp_path / 'p.parquet')
  assert texts(pair) == TEXTS and pair.scores == (8.5, 4.0) and pair.margin == 4.5
  scores = {'score_chosen': [math.nan], 'score_rejected': [4.0]}
  pq.write_table(pa.table({n: [v] for n, v in PAIR.items()} | scores), tmp_path / 'q.parquet')
  with pytest.raises(UserError, match='q.parquet, row 1: score_chosen must be a finite number'):
    read_comparisons(tmp_path / 'q.parquet')


def test_what_is_written_is_read_back(tmp_path):
  pairs = [
    Comparison('a', (ASK,), 'yes', 'no', 0.25, source='label', truncated=(False, True)),
    Comparison('b', (ASK,), 'yes', 'maybe é', scores=(1.5, -2.0)),
    Comparison('c', (ASK,), 'yes', 'never', margin=0.5),
  ]
  assert write_comparisons(tmp_path / 'p.jsonl', pairs) == 3
  assert list(read_comparisons(tmp_path / 'p.jsonl')) == pairs
  judged = [
    JudgedResponse('a', (ASK,), 'yes', True, 'label', True),
    JudgedResponse('b', (ASK,), 'no', False),
  ]
  assert write_judged(tmp_path / 'j.jsonl', judged) == 2
  assert list(read_judged(tmp_path / 'j.jsonl')) == judged


def test_the_two_responses_of_a_comparison_are_judged_by_its_probability():
  make = lambda p: Comparison('a', (ASK,), 'yes', 'no', p, truncated=(True, False))  # noqa: E731
  assert list(judge_both([make(0.9)])) == [
    JudgedResponse('a/chosen', (ASK,), 'yes', True, '', True),
    JudgedResponse('a/rejected', (ASK,), 'no', False),
  ]
  assert [judged.desirable for judged in judge_both([make(0.1)])] == [False, True]
  assert not list(judge_both([make(0.5)]))


def test_hh_rlhf_is_read_and_rows_that_differ_before_the_reply_are_counted(tmp_path):
  ask = ('Hi', 'Hello. Human: no label', 'And?')
  rows = [
    {'chosen': transcript(*ask, 'yes'), 'rejected': transcript(*ask, 'no')},
    {'chosen': transcript(*ask, 'yes'), 'rejected': transcript('Hi', 'Bye', 'And?', 'no')},
    {'chosen': transcript(*ask, ''), 'rejected': transcript(*ask, 'no')},
    {'chosen': transcript(*ask, 'no'), 'rejected': transcript(*ask, ' no ')},
  ]
  found = read_comparisons(write(tmp_path / 'p.jsonl', rows), 'hh_rlhf')
  (pair,) = found
  roles = ['user', 'assistant', 'user']
  assert texts(pair) == (
    [{'role': r, 'content': c} for r, c in zip(roles, ask, strict=True)],
    'yes',
    'no',
  )
  assert found.counts == {
    'rows': 4,
    'kept': 1,
    'dropped': {'empty': 1, 'identical': 1, 'prompts_differ': 1},
  }


def test_the_published_pairs_of_hh_rlhf(data_dir):
  """Four published rows have an empty reply; doubled labels are joined, so that prompts agree."""
  found = read_comparisons(data_dir('hh_rlhf') / 'harmless-base-test.jsonl.gz', 'hh_rlhf')
  assert found.counts == {'rows': 2312, 'kept': 2308, 'dropped': {'empty': 4}}
  assert len({pair.id for pair in found}) == 2308


def test_d_cai_gives_the_pairs_that_are_asked_for(tmp_path):
  rows = [
    make_row('a', 'x', 'y', 'z', finish='length'),
    make_row('b', 'x', 'y', 'x'),
    make_row('c', 'x', kind='helpful'),
  ]
  folder = write_d_cai(tmp_path / 'd_cai', rows)
  found = {
    pairs: read_comparisons(folder, 'd_cai', pairs=pairs)
    for pairs in ('last_over_initial', 'each_over_previous', 'every_pair')
  }
  pairs_of = lambda name: [(p.id, p.chosen, p.rejected) for p in found[name]]  # noqa: E731
  assert pairs_of('last_over_initial') == [('a', 'z', 'x')]
  assert found['last_over_initial'].counts['dropped'] == {'identical': 1, 'not_revised': 1}
  # Chain b returns to its initial response, so its two rounds contradict each other.
  assert pairs_of('each_over_previous') == [('a/1-0', 'y', 'x'), ('a/2-1', 'z', 'y')]
  assert found['each_over_previous'].counts['dropped'] == {'contradictory': 2, 'not_revised': 1}
  assert pairs_of('every_pair') == [('a/1-0', 'y', 'x'), ('a/2-0', 'z', 'x'), ('a/2-1', 'z', 'y')]
  assert [p.truncated for p in found['each_over_previous']] == [(False, False), (True, False)]
  # preferences.jsonl of a run has the same pairs.
  write_preferences(tmp_path / 'preferences.jsonl', d_cai.read_rows(folder))
  (pair,) = read_comparisons(tmp_path / 'preferences.jsonl')
  (own,) = found['last_over_initial']
  assert (pair.id, texts(pair)) == (own.id, texts(own))
  assert pair.truncated == own.truncated == (True, False)


def test_a_form_of_a_plugin_is_found_by_its_name(tmp_path, restored_registries):
  @preferences.FORMS.register('mine')
  def read_mine(path, pairs):
    yield 'here', Comparison('a', (ASK,), path, pairs)
    yield 'there', 'boring'

  found = read_comparisons('some/path', 'mine')
  assert [pair.chosen for pair in found] == ['some/path']
  assert found.counts['dropped'] == {'boring': 1}
  with pytest.raises(UserError, match='no form of comparisons named .other.'):
    read_comparisons('some/path', 'other')
