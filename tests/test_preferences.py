"""Preference pairs."""

import json

from cai_jax.data.preferences import write_preferences


def make_row(name, *texts):
  """Return a row of D_CAI with an initial response and its revisions."""
  rounds = [{'revision': {'text': text}} for text in texts[1:]]
  message = {'role': 'user', 'content': 'hi'}
  return {'id': name, 'prompt': [message], 'initial': {'text': texts[0]}, 'rounds': rounds}


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
    'prompt': [{'role': 'user', 'content': 'hi'}],
    'chosen': [{'role': 'assistant', 'content': 'z'}],
    'rejected': [{'role': 'assistant', 'content': 'x'}],
  }
