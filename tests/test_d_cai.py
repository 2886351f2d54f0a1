"""D_CAI on disk: what is written is what is read."""

import pytest
import tensorflow_datasets as tfds

from cai_jax.data import d_cai
from cai_jax.runtime.errors import UserError


def make_row(i, rounds):
  def turn(text):
    return {'text': text, 'finish_reason': 'stop', 'logprob': -1.5, 'num_tokens': 3}

  return {
    'id': str(i),
    'kind': 'harmful' if rounds else 'helpful',
    'prompt': [{'role': 'user', 'content': f'question {i}'}],
    'metadata': '{}',
    'initial': turn(f'first {i}'),
    'rounds': [
      {'principle': 'ä', 'critique': turn(f'critique {r}'), 'revision': turn(f'revision {r}')}
      for r in range(rounds)
    ],
    'logprobs': [0.5, 0.25],
    'seed': 1,
    'model': 'm',
    'critique_model': 'm',
    'revision_model': 'm',
    'constitution': 'c',
  }


def test_rows_are_read_as_they_were_written(tmp_path):
  written = [make_row(0, 2), make_row(1, 0), make_row(2, 1)]
  d_cai.write_shard(tmp_path, 0, written[:2])
  d_cai.write_shard(tmp_path, 1, written[2:])
  d_cai.write_metadata(tmp_path, [2, 1])
  rows = d_cai.read_rows(tmp_path)
  assert len(rows) == 3 and list(rows) == written
  assert list(tmp_path.glob('.*.tmp')) == []
  assert tfds.builder_from_directory(tmp_path).info.splits['train'].num_examples == 3


def test_a_shard_has_the_same_bytes_whenever_it_is_written(tmp_path):
  rows = [make_row(0, 2), make_row(1, 0)]
  for folder in ('a', 'b'):
    (tmp_path / folder).mkdir()
    d_cai.write_shard(tmp_path / folder, 0, rows)
  a, b = (d_cai.shard_path(tmp_path / folder, 0).read_bytes() for folder in ('a', 'b'))
  assert a == b


def test_missing_shards_splits_and_datasets_are_errors(tmp_path):
  with pytest.raises(UserError, match='lacks 1 of 1 shards'):
    d_cai.write_metadata(tmp_path, [3])
  d_cai.write_shard(tmp_path, 0, [make_row(0, 1)])
  d_cai.write_metadata(tmp_path, [1])
  with pytest.raises(UserError, match="no split 'test'"):
    d_cai.read_rows(tmp_path, 'test')
  with pytest.raises(UserError, match='holds no TFDS dataset'):
    d_cai.read_rows(tmp_path / 'nowhere')
