"""Prompts: every source gives checked dialogues, and a fault is named with its line."""

import gzip
import json
import os
import pathlib
import re

import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core import naming

from cai_jax.data import prompts as p
from cai_jax.dialogue.plain import join_plain

DATA = pathlib.Path(
  os.environ.get('CAI_JAX_DATA', pathlib.Path(__file__).parents[1] / '../shared/data')
)
HH = DATA / 'hh_rlhf' / 'harmless-base-test.jsonl.gz'

U = {'role': 'user', 'content': 'hi'}
A = {'role': 'assistant', 'content': 'hello'}
S = {'role': 'system', 'content': 'be kind'}


def write(tmp_path, rows, name='p.jsonl'):
  path = tmp_path / name
  lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
  data = '\n'.join(lines).encode()
  path.write_bytes(gzip.compress(data) if name.endswith('.gz') else data)
  return str(path)


def dialogues(loaded):
  return [list(prompt.messages) for prompt in loaded]


@pytest.mark.parametrize('name', ['p.jsonl', 'p.jsonl.gz'])
def test_every_form_of_a_row(tmp_path, name):
  rows = [
    {'prompt': 'hi there'},
    {'messages': [S, U, A, U], 'id': 'mine', 'metadata': {'kind': 'x'}, 'score': 3},
    '',
    {'prompt': [U], 'chosen': [A], 'rejected': [A], 'id': 7},
    {'chosen': [U, A, U, A], 'rejected': 'anything'},
    {
      'chosen': '\n\nHuman: a: b\nHuman: c\n\nAssistant: d\n\nHuman: e\n\nAssistant:',
      'rejected': '',
    },
    {'prompt': '\n\nHuman: open\n\nAssistant:'},
  ]
  loaded = p.load(write(tmp_path, rows, name), metadata_fields=())
  assert dialogues(loaded) == [
    [{'role': 'user', 'content': 'hi there'}],
    [S, U, A, U],
    [U],
    [U, A, U],
    [
      {'role': 'user', 'content': 'a: b\nHuman: c'},
      {'role': 'assistant', 'content': 'd'},
      {'role': 'user', 'content': 'e'},
    ],
    [{'role': 'user', 'content': 'open'}],
  ]
  assert [loaded[1].id, loaded[2].id] == ['mine', '7']
  assert loaded[1].metadata == {'kind': 'x'} and loaded[0].metadata == {}
  one = write(tmp_path, [rows[1]])
  assert p.load(one, metadata_fields=('score',))[0].metadata == {'kind': 'x', 'score': '3'}
  with pytest.raises(ValueError, match=r"line 1: the metadata fields \['tone'\]"):
    p.load(one, metadata_fields=('tone',))


def test_text_file(tmp_path):
  loaded = p.load(write(tmp_path, ['\ufefffirst: one ', '', 'second'], 'p.txt'))
  assert [prompt.messages[0]['content'] for prompt in loaded] == ['first: one', 'second']


@pytest.mark.parametrize(
  ('row', 'message'),
  [
    ('{"prompt": "a"', 'not JSON'),
    ('[1]', 'must be an object, got a list'),
    ({'text': 'a'}, r"none of the fields .* which has \['text'\]"),
    ({'prompt': ' '}, r'message 0 \(user\) needs a text that is not blank'),
    ({'prompt': 3}, 'must be a text or a list of messages, got 3'),
    ({'messages': []}, r'got the roles \[\]'),
    ({'messages': [U, A]}, r"belongs in the field 'chosen'.*\['user', 'assistant'\]"),
    ({'messages': [U, U]}, 'in turn'),
    ({'messages': [A, U]}, 'in turn'),
    ({'messages': [U, S, U]}, 'in turn'),
    ({'messages': [{'role': 'tool', 'content': 'x'}, U]}, "role 'tool'; allowed are"),
    ({'messages': [{'role': 'user'}]}, "keys 'role' and 'content'"),
    ({'messages': [{'role': 'user', 'content': [1]}]}, 'needs a text'),
    ({'messages': ['hi']}, "keys 'role' and 'content'"),
    ({'chosen': [U]}, 'must end with the assistant'),
    ({'chosen': 'hi'}, 'begins with one of the labels'),
    ({'prompt': 'a', 'id': ''}, 'id must be a text that is not empty'),
    ({'prompt': 'a', 'id': None}, 'id must be'),
    ({'prompt': 'a', 'metadata': {'n': 1}}, 'metadata must be texts'),
    ({'prompt': 'a', 'metadata': []}, 'metadata must be an object'),
    ('{"prompt": "\\ud800"}', 'surrogate'),
  ],
)
def test_a_malformed_row_is_named_with_its_line_and_what_is_allowed(tmp_path, row, message):
  path = write(tmp_path, [{'prompt': 'fine'}, '', row])
  with pytest.raises(ValueError, match=message) as error:
    p.load(path)
  assert f'{path}, line 3: ' in str(error.value)
  assert 'A row has its dialogue as' in str(error.value)


def test_sources_that_are_missing_empty_or_broken(tmp_path):
  for source, message in [
    (str(tmp_path / 'no.jsonl'), 'no.jsonl: no such file'),
    (write(tmp_path, [], 'empty.jsonl'), 'empty.jsonl: holds no prompt'),
    (write(tmp_path, ['', ' '], 'blank.txt'), 'blank.txt: holds no prompt'),
    (write(tmp_path, ['a'], 'p.csv'), 'p.csv: prompts come from a .jsonl or .txt file'),
  ]:
    with pytest.raises(ValueError, match=message):
      p.load(source)
  broken = pathlib.Path(write(tmp_path, [{'prompt': 'a'}] * 99, 'cut.jsonl.gz'))
  broken.write_bytes(broken.read_bytes()[:-20])
  with pytest.raises(ValueError, match='a broken gzip file'):
    p.load(str(broken))
  (tmp_path / 'latin.txt').write_bytes(b'fine\nna\xefve\n')
  with pytest.raises(ValueError, match='latin.txt, line 2: not UTF-8'):
    p.load(str(tmp_path / 'latin.txt'))


def test_arguments_that_do_not_fit(tmp_path):
  path = write(tmp_path, [{'prompt': 'a'}])
  for arguments, message in [
    ({'limit': 0}, 'limit must be 1 or more'),
    ({'name': 'x'}, "name is for the sources 'tfds' and 'hub'"),
    ({'subset': 'x'}, "source='hub' only"),
  ]:
    with pytest.raises(ValueError, match=message):
      p.load(path, **arguments)
  with pytest.raises(ValueError, match='which need it'):
    p.load('hub')


def test_ids_are_stable_unique_and_follow_the_content(tmp_path):
  first = p.load(write(tmp_path, [{'prompt': 'a'}, {'prompt': 'b'}, {'prompt': 'a'}]))
  again = p.load(
    write(tmp_path, [{'prompt': 'b'}, {'messages': [{'role': 'user', 'content': 'a'}]}])
  )
  assert first[0].id == again[1].id and first[1].id == again[0].id
  assert first[2].id == f'{first[0].id}-1'
  rows = [{'prompt': 'a', 'id': 'x'}, {'prompt': 'b'}, {'prompt': 'c', 'id': 'x'}]
  with pytest.raises(ValueError, match=r"line 3: the id 'x' is already given at .* line 1"):
    p.load(write(tmp_path, rows))
  with pytest.raises(ValueError, match='line 1: its dialogue hashes to the id given'):
    p.load(write(tmp_path, [{'prompt': 'a'}, {'prompt': 'b', 'id': first[0].id}]))


def test_limit_and_shuffle(tmp_path):
  rows = [{'prompt': str(i)} for i in range(40)]
  path = write(tmp_path, rows)
  whole = p.load(path)
  assert p.load(path, limit=5) == whole[:5] and p.load(path, limit=99) == whole
  shuffled = p.load(path, shuffle_seed=1)
  assert shuffled != whole and sorted(x.id for x in shuffled) == sorted(x.id for x in whole)
  assert p.load(path, shuffle_seed=1, limit=7) == shuffled[:7]
  assert p.load(path, shuffle_seed=2) != shuffled
  assert p.load(write(tmp_path, rows[::-1], 'other.jsonl'), shuffle_seed=1) == shuffled


def make_tfds(folder, rows):
  text = tfds.features.Text()
  features = tfds.features.FeaturesDict(
    {
      'id': text,
      'metadata': text,
      'prompt': tfds.features.Sequence({'role': text, 'content': text}),
      'question': text,
    }
  )
  template = naming.ShardedFileTemplate(
    data_dir=str(folder),
    dataset_name='chat',
    split='train',
    filetype_suffix='array_record',
    template='{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}',
  )
  path = template.sharded_filepath(shard_index=0, num_shards=1)
  writer = ArrayRecordWriter(str(path), 'group_size:1')
  for row in rows:
    writer.write(features.serialize_example(features.encode_example(row)))
  writer.close()
  split = tfds.core.SplitInfo(
    name='train', shard_lengths=[len(rows)], num_bytes=0, filename_template=template
  )
  tfds.folder_dataset.write_metadata(
    data_dir=str(folder),
    features=features,
    split_infos=[split],
    filename_template=template.template,
    check_data=False,
  )


def test_tfds_dataset(tmp_path):
  accented = {'role': 'user', 'content': 'naïve?'}
  row = {'id': 'r', 'metadata': '{"kind": "x"}', 'prompt': [accented, A, U], 'question': 'why'}
  make_tfds(tmp_path, [row, {**row, 'id': 's', 'metadata': '{}', 'prompt': [U]}])
  loaded = p.load('tfds', str(tmp_path))
  assert loaded == [p.Prompt('r', (accented, A, U), {'kind': 'x'}), p.Prompt('s', (U,), {})]
  by_field = p.load('tfds', str(tmp_path), field='question')
  assert by_field[0].messages == ({'role': 'user', 'content': 'why'},)
  with pytest.raises(ValueError, match="row 0: none of the fields .'answer'. is in the row"):
    p.load('tfds', str(tmp_path), field='answer')
  with pytest.raises(ValueError, match="split 'test' of it: Unknown split"):
    p.load('tfds', str(tmp_path), split='test')
  with pytest.raises(ValueError, match='TFDS cannot read'):
    p.load('tfds', 'there_is_no_such_dataset')


def test_folder_by_datasets(tmp_path, monkeypatch):
  monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
  folder = tmp_path / 'data'
  folder.mkdir()
  write(folder, [{'question': 'why?'}, {'question': 'how?'}], 'train.jsonl')
  loaded = p.load('hub', str(folder), field='question')
  assert [prompt.messages[0]['content'] for prompt in loaded] == ['why?', 'how?']
  with pytest.raises(ValueError, match="cannot load split 'test'"):
    p.load('hub', str(folder), split='test')


@pytest.mark.skipif(not HH.is_file(), reason=f'the published HH-RLHF test rows are not in {HH}')
def test_published_dialogues_parse_wholly():
  loaded = p.load(str(HH))
  with gzip.open(HH, 'rt') as file:
    texts = [json.loads(line)['chosen'] for line in file]
  assert len(loaded) == len(texts) == 2312
  assert len({prompt.id for prompt in loaded}) == 2312
  joined = 0
  for prompt, text in zip(loaded, texts, strict=True):
    expected = text[: text.rindex('\n\nAssistant:')]
    found = join_plain(prompt.messages)
    if found == expected:
      continue
    # The published row has the assistant's label twice in a row.
    joined += 1
    without = re.sub('\n\n(Human|Assistant): ?', '\n\n', text)
    for message in prompt.messages:
      assert message['content'] in without
  assert joined == 8
  several = sum(sum(m['role'] == 'user' for m in prompt.messages) > 1 for prompt in loaded)
  assert round(several / len(loaded), 2) == 0.71


def test_disjoint_sets():
  def prompt(identity, *contents):
    roles = ('user', 'assistant', 'user')
    return p.Prompt(
      identity, [{'role': r, 'content': c} for r, c in zip(roles, contents, strict=False)]
    )

  training = [prompt('a', 'How  do I\nbake?'), prompt('b', 'x', 'y', 'yes')]
  p.check_disjoint(training, [prompt('c', 'yes'), prompt('d', 'z', 'y', 'yes')])
  with pytest.raises(ValueError, match=r"1 of the held-out .* run 'a' is held-out 'c': 'how do i"):
    p.check_disjoint(training, [prompt('c', 'how do i BAKE?')], ('run', 'held-out'))
