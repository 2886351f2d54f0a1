"""Rows and files of preferences for tests."""

import gzip
import json

from cai_jax.data import d_cai

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
