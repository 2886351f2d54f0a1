"""D_CAI on disk: what is written is what is read."""

import json
import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer

from cai_jax.data import d_cai
from cai_jax.data.records import make_decoder, to_plain
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


def test_rows_are_those_that_tfds_decodes(tmp_path):
  details = {'revised': True, 'sampled_tokens': 4, 'details': '{}'}
  written = [make_row(0, 2), make_row(1, 0) | {'logprobs': []}]
  for row in written:
    for step in row['rounds']:
      step |= details
  d_cai.write_shard(tmp_path, 0, written, details=True)
  d_cai.write_metadata(tmp_path, [2], details=True)
  rows = d_cai.read_rows(tmp_path)
  source = tfds.builder_from_directory(tmp_path).as_data_source('train')
  assert list(rows) == [to_plain(row) for row in source] == written
  assert rows[0]['rounds'][0]['revised'] is True
  # The order of keys too, because files are written from rows.
  assert json.dumps(list(rows)) == json.dumps([to_plain(row) for row in source])
  assert list(rows[0]) == sorted(rows[0]) and list(rows[0]['prompt'][0]) == ['content', 'role']
  some = [{'id': row['id'], 'prompt': row['prompt']} for row in written]
  assert list(rows.iterate(('id', 'prompt'))) == some
  assert list(pickle.loads(pickle.dumps(rows))) == written


def test_other_features_are_decoded_by_tfds():
  features = tfds.features.FeaturesDict(
    {'id': tfds.features.Text(), 'pairs': tfds.features.Sequence(tfds.features.Tensor(
      shape=(2,), dtype=np.int32))}
  )  # fmt: skip
  serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
  record = serializer.serialize_example(
    features.encode_example({'id': 'ä', 'pairs': [[1, 2], [3, 4]]})
  )
  assert make_decoder(features)(record) == {'id': 'ä', 'pairs': [[1, 2], [3, 4]]}
