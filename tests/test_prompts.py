"""Prompts: every source gives checked dialogues, and errors name the line."""

import gzip
import json
import os
import pathlib
import re

import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core import naming

from cai_jax.data.prompt_sources import SOURCES
from cai_jax.data.prompts import Prompt, PromptSource, check_disjoint, load_prompts
from cai_jax.dialogue.plain import join_plain
from cai_jax.runtime.errors import UserError

DATA = pathlib.Path(
  os.environ.get('CAI_JAX_DATA', pathlib.Path(__file__).parents[1] / '../shared/data')
)
HH = DATA / 'hh_rlhf' / 'harmless-base-test.jsonl.gz'

U = {'role': 'user', 'content': 'hi'}
A = {'role': 'assistant', 'content': 'hello'}
S = {'role': 'system', 'content': 'be kind'}


def load(source, name='', seed=0, **settings):
  return load_prompts(PromptSource(str(source), name, **settings), seed)


def write(tmp_path, rows, name='p.jsonl'):
  path = tmp_path / name
  lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
  data = '\n'.join(lines).encode()
  path.write_bytes(gzip.compress(data) if name.endswith('.gz') else data)
  return str(path)


def dialogues(loaded):
  return [list(prompt.messages) for prompt in loaded]


@pytest.mark.parametrize('name', ['p.jsonl', 'p.jsonl.gz'])
def test_every_row_format_is_parsed(tmp_path, name):
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
  loaded = load(write(tmp_path, rows, name), metadata_fields=())
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
  path = write(tmp_path, [rows[1]])
  assert load(path, metadata_fields=('score',))[0].metadata == {'kind': 'x', 'score': '3'}
  with pytest.raises(UserError, match=r"line 1: The row lacks the metadata fields \['tone'\]"):
    load(path, metadata_fields=('tone',))


def test_registered_file_format_is_read(tmp_path):
  def read_csv(source, seed):
    lines = pathlib.Path(source.source).read_text().splitlines()
    for number, line in enumerate(lines, 1):
      yield f'line {number}', {'prompt': line.split(',')[0]}

  if '.csv2' not in SOURCES:
    SOURCES.register('.csv2')(read_csv)
  loaded = load(write(tmp_path, ['why?,1', 'how?,2'], 'p.csv2'))
  assert [prompt.messages[0]['content'] for prompt in loaded] == ['why?', 'how?']


def test_text_files_have_one_prompt_per_line(tmp_path):
  loaded = load(write(tmp_path, ['\ufefffirst: one ', '', 'second'], 'p.txt'))
  assert [prompt.messages[0]['content'] for prompt in loaded] == ['first: one', 'second']


@pytest.mark.parametrize(
  ('row', 'message'),
  [
    ('{"prompt": "a"', 'not valid JSON'),
    ('[1]', 'must be an object, but got a list'),
    ({'text': 'a'}, r"none of the fields .* It has \['text'\]"),
    ({'prompt': ' '}, r'content of message 0 \(user\) must be non-blank text'),
    ({'prompt': 3}, 'must be text or a list of messages, but got 3'),
    ({'messages': []}, r'got the roles \[\]'),
    ({'messages': [U, A]}, r"\['user', 'assistant'\].*into the field 'chosen'"),
    ({'messages': [U, U]}, 'alternating'),
    ({'messages': [A, U]}, 'alternating'),
    ({'messages': [U, S, U]}, 'alternating'),
    ({'messages': [{'role': 'tool', 'content': 'x'}, U]}, "role 'tool'. The allowed roles are"),
    ({'messages': [{'role': 'user'}]}, "keys 'role' and 'content'"),
    ({'messages': [{'role': 'user', 'content': [1]}]}, 'must be non-blank text'),
    ({'messages': ['hi']}, "keys 'role' and 'content'"),
    ({'chosen': [U]}, 'must end with the assistant'),
    ({'chosen': 'hi'}, 'must begin with one of the labels'),
    ({'prompt': 'a', 'id': ''}, 'id must be an integer or non-empty text'),
    ({'prompt': 'a', 'id': None}, 'id must be'),
    ({'prompt': 'a', 'metadata': {'n': 1}}, 'metadata must be texts'),
    ({'prompt': 'a', 'metadata': []}, 'metadata must be an object'),
    ({'prompt': 'a', 'metadata': '1' * 5000}, 'metadata must be an object'),
    ('{"prompt": "\\ud800"}', 'surrogate'),
  ],
)
def test_errors_in_rows_name_the_line_and_the_allowed_fields(tmp_path, row, message):
  path = write(tmp_path, [{'prompt': 'fine'}, '', row])
  with pytest.raises(UserError, match=message) as error:
    load(path)
  assert f'{path}, line 3: ' in str(error.value)
  assert 'A row needs' in str(error.value)


def test_missing_empty_and_damaged_sources_are_errors(tmp_path):
  for source, message in [
    (str(tmp_path / 'no.jsonl'), 'no.jsonl: there is no such file'),
    (write(tmp_path, [], 'empty.jsonl'), 'empty.jsonl: the source is empty'),
    (write(tmp_path, ['', ' '], 'blank.txt'), 'blank.txt: the source is empty'),
    (
      write(tmp_path, ['a'], 'p.docx'),
      r"p.docx: there is no such source .*'.jsonl'.*'.txt'.*'tfds', 'hub'",
    ),
  ]:
    with pytest.raises(UserError, match=message):
      load(source)
  broken = pathlib.Path(write(tmp_path, [{'prompt': 'a'}] * 99, 'cut.jsonl.gz'))
  broken.write_bytes(broken.read_bytes()[:-20])
  with pytest.raises(UserError, match='the gzip file is damaged'):
    load(broken)
  (tmp_path / 'latin.txt').write_bytes(b'fine\nna\xefve\n')
  with pytest.raises(UserError, match='latin.txt, line 2: the text is not UTF-8'):
    load(tmp_path / 'latin.txt')


def test_settings_that_a_source_ignores_are_errors(tmp_path):
  path = write(tmp_path, [{'prompt': 'a'}])
  for arguments, message in [
    ({'limit': 0}, 'limit must be at least 1'),
    ({'name': 'x'}, 'does not support name'),
    ({'subset': 'x'}, 'does not support subset'),
  ]:
    with pytest.raises(UserError, match=message):
      load(path, **arguments)
  with pytest.raises(UserError, match='needs a dataset'):
    load('hub')


def test_ids_are_unique_and_depend_on_the_content_only(tmp_path):
  first = load(write(tmp_path, [{'prompt': 'a'}, {'prompt': 'b'}, {'prompt': 'a'}]))
  again = load(write(tmp_path, [{'prompt': 'b'}, {'messages': [{'role': 'user', 'content': 'a'}]}]))
  assert first[0].id == again[1].id and first[1].id == again[0].id
  assert first[2].id == f'{first[0].id}-1'
  rows = [{'prompt': 'a', 'id': 'x'}, {'prompt': 'b'}, {'prompt': 'c', 'id': 'x'}]
  with pytest.raises(UserError, match=r"line 3: the id 'x' is already used at .* line 1"):
    load(write(tmp_path, rows))
  with pytest.raises(UserError, match='line 1: the hash of this dialogue equals the id given'):
    load(write(tmp_path, [{'prompt': 'a'}, {'prompt': 'b', 'id': first[0].id}]))


def test_limit_counts_only_with_a_source():
  assert PromptSource(source='', limit=0).limit == 0


def test_shuffling_depends_on_seed_and_ids_and_precedes_the_limit(tmp_path):
  rows = [{'prompt': str(i)} for i in range(40)]
  path = write(tmp_path, rows)
  whole = load(path)
  assert load(path, limit=5) == whole[:5] and load(path, limit=99) == whole
  shuffled = load(path, shuffle=True, seed=1)
  assert shuffled != whole and sorted(x.id for x in shuffled) == sorted(x.id for x in whole)
  assert load(path, shuffle=True, seed=1, limit=7) == shuffled[:7]
  assert load(path, shuffle=True, seed=2) != shuffled
  assert load(write(tmp_path, rows[::-1], 'other.jsonl'), shuffle=True, seed=1) == shuffled


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


def test_tfds_datasets_are_read(tmp_path):
  accented = {'role': 'user', 'content': 'naïve?'}
  row = {'id': 'r', 'metadata': '{"kind": "x"}', 'prompt': [accented, A, U], 'question': 'why'}
  make_tfds(tmp_path, [row, {**row, 'id': 's', 'metadata': '{}', 'prompt': [U]}])
  loaded = load('tfds', str(tmp_path))
  assert loaded == [Prompt('r', (accented, A, U), {'kind': 'x'}), Prompt('s', (U,), {})]
  by_field = load('tfds', str(tmp_path), field='question')
  assert by_field[0].messages == ({'role': 'user', 'content': 'why'},)
  with pytest.raises(UserError, match="row 0: The row has none of the fields .'answer'."):
    load('tfds', str(tmp_path), field='answer')
  with pytest.raises(UserError, match="split 'test': Unknown split"):
    load('tfds', str(tmp_path), split='test')
  with pytest.raises(UserError, match='TFDS cannot read'):
    load('tfds', 'there_is_no_such_dataset')


def test_folders_are_read_by_datasets(tmp_path, monkeypatch):
  monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
  folder = tmp_path / 'data'
  folder.mkdir()
  write(folder, [{'question': 'why?'}, {'question': 'how?'}], 'train.jsonl')
  loaded = load('hub', str(folder), field='question')
  assert [prompt.messages[0]['content'] for prompt in loaded] == ['why?', 'how?']
  with pytest.raises(UserError, match="cannot load split 'test'"):
    load('hub', str(folder), split='test')


@pytest.mark.skipif(not HH.is_file(), reason=f'the published HH-RLHF test rows are not in {HH}')
def test_published_dialogues_are_parsed_completely():
  loaded = load(HH)
  with gzip.open(HH, 'rt') as file:
    texts = [json.loads(line)['chosen'] for line in file]
  assert len(loaded) == len(texts) == 2312
  assert len({prompt.id for prompt in loaded}) == 2312
  num_joined = 0
  for prompt, text in zip(loaded, texts, strict=True):
    expected = text[: text.rindex('\n\nAssistant:')]
    actual = join_plain(prompt.messages)
    if actual == expected:
      continue
    # This published row has the same label twice in a row.
    num_joined += 1
    without = re.sub('\n\n(Human|Assistant): ?', '\n\n', text)
    for message in prompt.messages:
      assert message['content'] in without
  assert num_joined == 8
  multi_turn = sum(sum(m['role'] == 'user' for m in prompt.messages) > 1 for prompt in loaded)
  assert round(multi_turn / len(loaded), 2) == 0.71


def test_overlapping_sets_are_errors():
  def prompt(identity, *contents):
    roles = ('user', 'assistant', 'user')
    return Prompt(
      identity, [{'role': r, 'content': c} for r, c in zip(roles, contents, strict=False)]
    )

  training = [prompt('a', 'How  do I\nbake?'), prompt('b', 'x', 'y', 'yes')]
  check_disjoint(training, [prompt('c', 'yes'), prompt('d', 'z', 'y', 'yes')])
  with pytest.raises(UserError, match=r"1 of the held-out .* run 'a' is held-out 'c': 'how do i"):
    check_disjoint(training, [prompt('c', 'how do i BAKE?')], ('run', 'held-out'))
