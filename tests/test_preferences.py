"""Preference data: forms, bad rows, what is left out and counted, and splits by content."""

import gzip
import json
import math
import types

import pytest

from cai_jax.data import d_cai, preferences
from cai_jax.data.examples import hold_out
from cai_jax.data.preferences import (
  Comparison,
  JudgedResponse,
  find_held_out,
  group_comparisons,
  judge_both,
  read_comparisons,
  read_judged,
  write_comparisons,
  write_judged,
  write_preferences,
)
from cai_jax.data.prompts import Prompt, PromptSource
from cai_jax.pipeline.pairs import read_pairs
from cai_jax.runtime.errors import UserError

ASK = {'role': 'user', 'content': 'What color is the sky?'}
BLUE, GREEN = ({'role': 'assistant', 'content': f'It is {c}.'} for c in ('blue', 'green'))
PAIR = {'prompt': [ASK], 'chosen': [BLUE], 'rejected': [GREEN]}
TEXTS = ([ASK], 'It is blue.', 'It is green.')


def write(path, rows, newline='\n', mark=''):
  lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
  data = (mark + newline.join(lines)).encode()
  path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
  return path


def texts(pair):
  return list(pair.prompt), pair.chosen, pair.rejected


def transcript(*turns):
  labels = 'Human', 'Assistant'
  return ''.join(f'\n\n{labels[i % 2]}: {turn}' for i, turn in enumerate(turns))


def make_row(name, *responses, kind='harmful', finish='stop'):
  """Return a row of D_CAI with an initial response and its revisions."""
  turns = [
    {'text': text, 'finish_reason': 'stop', 'logprob': -1.0, 'num_tokens': 1} for text in responses
  ]
  turns[-1]['finish_reason'] = finish
  rounds = [{'principle': 'p', 'critique': turns[0], 'revision': turn} for turn in turns[1:]]
  return {
    'id': name,
    'kind': kind,
    'prompt': [{'role': 'user', 'content': f'hi {name}'}],
    'metadata': '{}',
    'initial': turns[0],
    'rounds': rounds,
    'logprobs': [-1.0],
    'seed': 0,
    **dict.fromkeys(('model', 'critique_model', 'revision_model', 'constitution'), 'm'),
  }


def write_d_cai(folder, rows):
  folder.mkdir()
  d_cai.write_shard(folder, 0, rows)
  d_cai.write_metadata(folder, [len(rows)])
  return folder


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


# Bad rows.

BAD = {
  'lacks rejected': {'prompt': [ASK], 'chosen': [BLUE]},
  'lacks chosen, rejected': {'messages': [ASK]},
  'lacks chosen.': {**PAIR, 'chosen': None},
  'prompts of chosen and rejected differ': {
    'chosen': [ASK, BLUE],
    'rejected': [{'role': 'user', 'content': 'What color is grass?'}, GREEN],
  },
  'chosen begins with another prompt': {**PAIR, 'chosen': [ASK, BLUE, ASK, BLUE]},
  'chosen must end with a message of the assistant': {**PAIR, 'chosen': [ASK]},
  'rejected must end with a message of the assistant': {
    'chosen': [ASK, BLUE],
    'rejected': [ASK, GREEN, ASK],
  },
  'The roles have|A prompt must be': {**PAIR, 'prompt': [BLUE]},
  'content of message 0 .user. must be non-blank': {
    **PAIR,
    'prompt': [{'role': 'user', 'content': ' '}],
  },
  'nothing says where the prompt ends': {'chosen': 'The sky is blue.', 'rejected': 'It is green.'},
  'probability must be a number from 0 to 1, but got 1.5': {**PAIR, 'probability': 1.5},
  'probability must be a number from 0 to 1, but got True': {**PAIR, 'probability': True},
  "but got '0.5'": {**PAIR, 'probability': '0.5'},
  'NaN is not a JSON value': json.dumps({**PAIR, 'score_chosen': math.nan, 'score_rejected': 1}),
  'score_chosen and score_rejected must both': {**PAIR, 'score_chosen': 1},
  'margin must be a finite number': {**PAIR, 'margin': 'large'},
  'truncated must be a list': {**PAIR, 'truncated': True},
  'A row must be an object': [PAIR],
  'not valid JSON': '{"prompt": ',
  'An id must be an integer or non-empty text': {**PAIR, 'id': 1.5},
  'An id must be printable text': {**PAIR, 'id': ''},
  'unpaired surrogate': json.dumps({**PAIR, 'chosen': '\ud800'}),
}


@pytest.mark.parametrize('message', BAD)
def test_a_bad_row_is_an_error_that_names_the_file_and_the_line(tmp_path, message):
  path = write(tmp_path / 'p.jsonl', [{**PAIR, 'rejected': 'another'}, BAD[message]])
  with pytest.raises(UserError, match=rf'p\.jsonl, line 2: .*(?:{message})'):
    read_comparisons(path)


def test_bad_rows_can_be_left_out_and_are_counted(tmp_path, capsys):
  rows = [PAIR, BAD['lacks rejected'], {**PAIR, 'probability': 2}]
  found = read_comparisons(write(tmp_path / 'p.jsonl', rows), invalid='skip')
  assert found.counts == {'rows': 3, 'kept': 1, 'dropped': {'invalid': 2}}
  assert '2 rows are left out, such as' in capsys.readouterr().out
  with pytest.raises(UserError, match="invalid='ignore' must be"):
    read_comparisons(tmp_path / 'p.jsonl', invalid='ignore')


def test_a_file_without_a_comparison_is_an_error(tmp_path):
  same = {**PAIR, 'rejected': [BLUE]}
  with pytest.raises(UserError, match="none of 2 rows is left; dropped: {'identical': 2}"):
    read_comparisons(write(tmp_path / 'p.jsonl', [same, same]))
  with pytest.raises(UserError, match='has no row'):
    read_comparisons(write(tmp_path / 'q.jsonl', []))
  with pytest.raises(UserError, match='must end in one of'):
    read_comparisons(write(tmp_path / 'p.txt', [PAIR]))
  with pytest.raises(UserError, match='no such file'):
    read_comparisons(tmp_path / 'absent.jsonl')
  with pytest.raises(UserError, match="pairs='all' must be one of"):
    read_comparisons(tmp_path / 'p.jsonl', pairs='all')


def test_repeated_pairs_stay_once_and_contradictions_not_at_all(tmp_path):
  def row(chosen, rejected, probability=1.0, question='Why?'):
    return {
      'prompt': question,
      'chosen': chosen,
      'rejected': rejected,
      'probability': probability,
    }

  rows = [
    row('a', 'b'),
    row('a', 'b', 0.7),  # duplicate
    row('b', 'a', 0.2),  # duplicate: it says the same in the other order
    row('c', 'd'),
    row('d', 'c'),  # contradictory
    row('c', 'd', 0.5),  # decides nothing, but belongs to a contradiction
    row('e', 'f', 0.5),
    row('f', 'e', 0.5),  # duplicate
    row('c', 'd', 1.0, 'How?'),
  ]
  found = read_comparisons(write(tmp_path / 'p.jsonl', rows))
  assert [(p.chosen, p.rejected, p.probability) for p in found] == [
    ('a', 'b', 1),
    ('e', 'f', 0.5),
    ('c', 'd', 1),
  ]
  assert found.counts['dropped'] == {'contradictory': 3, 'duplicate': 3}
  assert len(found) == 3 == len(list(found))


def test_an_id_that_occurs_twice_is_an_error(tmp_path):
  rows = [
    {'id': 'a', **PAIR},
    {'id': 'b', **PAIR, 'rejected': 'x'},
    {'id': 'a', **PAIR, 'chosen': 'y'},
  ]
  with pytest.raises(UserError, match="line 3: the id 'a' is already used at .*line 1"):
    read_comparisons(write(tmp_path / 'p.jsonl', rows))


@pytest.mark.parametrize('rows', [[], [PAIR], [PAIR, {'prompt': 'Why?'}], [PAIR] * 3])
def test_a_file_that_changes_after_its_check_is_an_error(tmp_path, rows):
  other = {'prompt': 'Why?', 'chosen': 'Rain.', 'rejected': 'Snow.'}
  found = read_comparisons(write(tmp_path / 'p.jsonl', [PAIR, other]))
  write(tmp_path / 'p.jsonl', rows)
  with pytest.raises(UserError, match='file has changed since its rows were checked'):
    list(found)


def test_filters_look_at_the_better_response(tmp_path):
  bad = "Here's my revised response: it is blue."
  rows = [
    {**PAIR, 'chosen': bad},
    {**PAIR, 'rejected': bad},
    {**PAIR, 'rejected': bad, 'chosen': 'It is red.', 'probability': 0.1},
    {**PAIR, 'chosen': 'It is grey.', 'truncated': [True, False]},
  ]
  path = write(tmp_path / 'p.jsonl', rows)
  found = read_comparisons(path, filters=('truncated', 'preamble_phrase'))
  assert [pair.rejected for pair in found] == [bad]
  assert found.counts['dropped'] == {'filtered_preamble_phrase': 2, 'filtered_truncated': 1}
  with pytest.raises(UserError, match="no filter 'low_logprob' of preferences"):
    read_comparisons(path, filters=('low_logprob',))


@pytest.mark.parametrize(
  ('row', 'message'),
  [
    ({'prompt': [ASK], 'completion': [BLUE]}, 'lacks label'),
    ({'prompt': [ASK], 'completion': [BLUE], 'label': 1}, 'label and truncated must be'),
    ({'completion': [ASK, BLUE], 'label': True}, 'lacks prompt'),
    ({'prompt': [ASK], 'completion': [ASK], 'label': True}, 'completion must end with'),
  ],
)
def test_bad_judged_responses_are_errors(tmp_path, row, message):
  with pytest.raises(UserError, match=rf'p\.jsonl, line 1: .*{message}'):
    read_judged(write(tmp_path / 'p.jsonl', [row]))


def test_judged_responses_with_two_labels_are_left_out(tmp_path):
  row = {'prompt': ASK['content'], 'completion': 'blue', 'label': True}
  rows = [row, {**row, 'label': False}, {**row, 'completion': 'red'}, {**row, 'completion': ' '}]
  found = read_judged(write(tmp_path / 'p.jsonl', [*rows, rows[2]]))
  assert [judged.response for judged in found] == ['red']
  assert found.counts['dropped'] == {'contradictory': 2, 'duplicate': 1, 'empty': 1}


# Splits.

LONG = 'please explain to me in a few short words how one opens the old lock of my garden door'


def make_pairs(*questions):
  return [
    Comparison(str(i), ({'role': 'user', 'content': text},), 'yes', 'no')
    for i, text in enumerate(questions)
  ]


def test_comparisons_with_near_duplicate_prompts_are_held_out_together():
  pairs = make_pairs(LONG, 'Who?', LONG + ' today', 'who? ', 'What is 2?', 'What is 3?')
  groups = group_comparisons(pairs)
  assert groups['0'] == groups['2'] and groups['1'] == groups['3']
  assert len(set(groups.values())) == 4
  for seed in range(8):
    sides = [{groups[p.id] for p in side} for side in hold_out(pairs, 0.4, seed, groups)]
    assert all(sides) and not sides[0] & sides[1]


def test_comparisons_of_evaluation_prompts_are_left_out(tmp_path):
  pairs = make_pairs(LONG, 'Who?', 'What is 2?')
  write_comparisons(tmp_path / 'p.jsonl', pairs)
  found = read_comparisons(tmp_path / 'p.jsonl')
  evaluation = [({'role': 'user', 'content': text},) for text in ('x', LONG + ' today', 'WHO?')]
  near = find_held_out(found, evaluation)
  assert near == {'0': 1, '1': 2} and find_held_out(found, []) == {}
  rest = found.leave_out(near, 'held_out')
  assert [pair.id for pair in rest] == ['2'] and len(found) == 3
  assert rest.counts == {'rows': 3, 'kept': 1, 'dropped': {'held_out': 2}}
  with pytest.raises(UserError, match='none of 3 rows is left'):
    found.leave_out('012', 'held_out')


@pytest.mark.parametrize('source', ['questions.jsonl', 'tiny'])
def test_a_run_leaves_out_what_nearly_equals_its_held_out_prompts(tmp_path, source):
  """Prompts of the embedded world resemble each other, so only equal ones count there."""
  write_comparisons(tmp_path / 'p.jsonl', make_pairs(LONG, 'Who?'))

  def read(question):
    held_out = [Prompt('e', ({'role': 'user', 'content': question},))]
    sources = dict.fromkeys(('eval_harmful', 'eval_helpful'), PromptSource(source))
    run = types.SimpleNamespace(
      d_cai=None,
      workdir=tmp_path,
      prompts={'eval_harmful': held_out, 'eval_helpful': []},
      config=types.SimpleNamespace(seed=0, prompts=types.SimpleNamespace(**sources)),
    )
    section = types.SimpleNamespace(
      section='prefer', data=str(tmp_path / 'p.jsonl'), form='trl', shuffle=False
    )
    return read_pairs(run, section)

  dropped = read(LONG + ' today').counts['read']['dropped']
  assert dropped == ({} if source == 'tiny' else {'near_held_out': 1})
  with pytest.raises(UserError, match='prefer.data=.*p.jsonl.*also occur in the training prompts'):
    read('WHO?')
