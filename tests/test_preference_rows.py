"""Preference data: bad rows, what is left out and counted, and splits by content."""

import json
import math
import types

import pytest

from cai_jax.data.examples import hold_out
from cai_jax.data.preferences import (
  Comparison,
  find_held_out,
  group_comparisons,
  read_comparisons,
  read_judged,
  write_comparisons,
)
from cai_jax.data.prompts import Prompt, PromptSource
from cai_jax.pipeline.pair_sources import LABELS_FILE
from cai_jax.pipeline.pairs import read_pairs
from cai_jax.pipeline.preference_config import PolicyConfig
from cai_jax.runtime.errors import UserError
from tests.preference_files import ASK, BLUE, GREEN, PAIR, write

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


@pytest.mark.parametrize(
  ('source', 'name'), [('questions.jsonl', ''), ('tiny', ''), ('questions.jsonl', 'labels')]
)
def test_a_run_leaves_out_what_nearly_equals_its_held_out_prompts(tmp_path, source, name):
  """Prompts of the embedded world resemble each other, so only equal ones count there."""
  path = tmp_path / (LABELS_FILE if name else 'p.jsonl')
  path.parent.mkdir(exist_ok=True)
  write_comparisons(path, make_pairs(LONG, 'Who?'))

  def read(question):
    held_out = [Prompt('e', ({'role': 'user', 'content': question},))]
    sources = dict.fromkeys(('eval_harmful', 'eval_helpful'), PromptSource(source))
    run = types.SimpleNamespace(
      d_cai=None,
      workdir=tmp_path,
      prompts={'eval_harmful': held_out, 'eval_helpful': []},
      config=types.SimpleNamespace(seed=0, prompts=types.SimpleNamespace(**sources)),
    )
    data = name or str(tmp_path / 'p.jsonl')
    return read_pairs(run, PolicyConfig(data=data))

  dropped = read(LONG + ' today').counts['read']['dropped']
  assert dropped == ({} if source == 'tiny' else {'near_held_out': 1})
  with pytest.raises(UserError, match='prefer.data=.*also occur in the training prompts'):
    read('WHO?')
