"""Files of prompts: formats, encodings, compression, and paths that are no files."""

import bz2
import codecs
import csv
import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cai_jax.data.prompts import PromptSource, load_prompts
from cai_jax.runtime.errors import UserError

U = {'role': 'user', 'content': 'naïve?'}
A = {'role': 'assistant', 'content': 'hello'}
LINES = '{"prompt": "naïve?"}\n{"prompt": "why\u2028?"}\n'


def read(path, **settings):
  return load_prompts(PromptSource(str(path), **settings))


def write(tmp_path, name, data):
  path = tmp_path / name
  path.write_bytes(data if isinstance(data, bytes) else data.encode())
  return path


def texts(loaded):
  return [prompt.messages[-1]['content'] for prompt in loaded]


@pytest.mark.parametrize(
  'data',
  [
    LINES.encode(),
    LINES.encode('utf-8-sig'),
    LINES.encode('utf-16'),
    codecs.BOM_UTF16_BE + LINES.encode('utf-16-be'),
    LINES.encode('utf-32'),
    LINES.replace('\n', '\r\n').encode(),
    LINES.replace('\n', '\r').encode(),
    gzip.compress(LINES.encode()),
    gzip.compress(LINES.encode('utf-16')),
    b''.join(gzip.compress(line.encode()) for line in LINES.splitlines(keepends=True)[:1])
    + gzip.compress(LINES.partition('\n')[2].encode()),
  ],
  ids=range(10),
)
@pytest.mark.parametrize('name', ['p.jsonl', 'p.jsonl.gz', 'p.ndjson', 'p.JSONL', 'p.json'])
def test_encodings_line_ends_and_compression_are_recognized(tmp_path, data, name):
  assert texts(read(write(tmp_path, name, data))) == ['naïve?', 'why\u2028?']


def test_json_arrays_are_read(tmp_path):
  array = json.dumps([{'prompt': 'a'}, {'messages': [U], 'id': 3}], indent=2)
  loaded = read(write(tmp_path, 'p.json', array))
  assert texts(loaded) == ['a', 'naïve?'] and str(loaded[1]) == f'{tmp_path}/p.json, row 2'
  assert texts(read(write(tmp_path, 'p.json', '{"prompt": "one"}'))) == ['one']
  for text, message in [
    ('{"data": []}', r"p.json is not a JSON array of rows: it contains {'data': \[\]}"),
    ('[{"prompt": "a"}', 'it is not valid JSON'),
    ('[{"prompt": "a"}, 3]', 'row 2: A row must be an object'),
    ('[]', 'the source is empty'),
    (' ', 'the source is empty'),
  ]:
    with pytest.raises(UserError, match=message):
      read(write(tmp_path, 'p.json', text))
  with pytest.raises(
    UserError, match='line 1: .*End the name of a file that is one array in .json'
  ):
    read(write(tmp_path, 'p.jsonl', array))


@pytest.mark.parametrize(
  ('name', 'delimiter'), [('p.csv', ','), ('p.tsv', '\t'), ('p.CSV.gz', ',')]
)
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
def test_tables_are_read(tmp_path, name, delimiter, encoding):
  path = tmp_path / name
  with open(path, 'w', encoding=encoding, newline='') as file:
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow(['id', 'prompt', 'messages', 'metadata', 'score'])
    writer.writerow(['a', 'one, "two"\nthree\tfour', '', '', '0.5'])
    writer.writerow([])
    writer.writerow(['b', '', json.dumps([U, A, U]), '{"kind": "x"}', ''])
  loaded = read(path, metadata_fields=('score',))
  assert texts(loaded) == ['one, "two"\nthree\tfour', 'naïve?'] and len(loaded[1].messages) == 3
  assert [p.id for p in loaded] == ['a', 'b']
  assert [p.metadata for p in loaded] == [{'score': '0.5'}, {'kind': 'x', 'score': ''}]
  assert str(loaded[1]) == f'{path}, row 2 (line 5)'


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('prompt,id\na\n', r'row 1 \(line 2\): the row has 1 cells, but the first line has 2'),
    ('prompt\na,b\n', r'row 1 \(line 2\): the row has 2 cells'),
    ('prompt,prompt\na,b\n', 'a column occurs twice'),
    ('prompt\n"a\n', 'line 2: the table cannot be read: unexpected end of data'),
    ('prompt\n"a"b\n', 'line 2: the table cannot be read'),
    ('How do I bake?\nHow do I fry?\n', r"row 1 .*none of the fields .* It has \['How do I bake"),
    ('prompt;id\na;b\n', r"none of the fields .* It has \['prompt;id'\]"),
    ('id,prompt\n,a\n', "row 1 .*An id must be .* got ''"),
    ("prompt,messages\n,\"[{'role': 'user'}]\"\n", 'row 1 .*not valid JSON'),
    ('prompt\n', 'the source is empty'),
    ('', 'the source is empty'),
  ],
)
def test_errors_in_tables_name_the_row(tmp_path, text, message):
  with pytest.raises(UserError, match=f'p.csv.*{message}'):
    read(write(tmp_path, 'p.csv', text))


def test_parquet_files_are_read(tmp_path):
  rows = [
    {'id': 1, 'messages': [U, A, U], 'prompt': None, 'metadata': {'kind': 'x', 'other': None}},
    {'id': 2, 'messages': None, 'prompt': 'hi', 'metadata': None},
  ]
  path = tmp_path / 'p.parquet'
  pq.write_table(pa.Table.from_pylist(rows), path)
  loaded = read(path)
  assert texts(loaded) == ['naïve?', 'hi'] and loaded[0].metadata == {'kind': 'x'}
  assert str(loaded[1]) == f'{path}, row 2'
  pq.write_table(pa.Table.from_pylist([{'prompt': 'a'}, {'prompt': b'b'.decode()}, {'x': 1}]), path)
  with pytest.raises(UserError, match='row 3: The row has none of the fields'):
    read(path)
  pq.write_table(pa.table({'prompt': pa.array([b'\xff'], pa.binary())}), path)
  with pytest.raises(UserError, match='row 1: .* but got b.*xff'):
    read(path)
  whole = path.read_bytes()
  for data in (whole[:-20], whole[:40] + b'\xff' * 20 + whole[60:], b'PAR1', b''):
    with pytest.raises(UserError, match='p.parquet.*the Parquet file is damaged'):
      read(write(tmp_path, 'p.parquet', data))


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    (b'{"prompt": "a", "prompt": "b"}', "the key 'prompt' occurs twice"),
    (b'{"prompt": "a", "score": NaN}', 'NaN is not a JSON value'),
    (b'{"prompt": "a", "score": -Infinity}', '-Infinity is not a JSON value'),
    (b'{"prompt": "a", "score": 1e999}', 'the number 1e999 is too large'),
    (b'{"prompt": "a", "id": ' + b'9' * 5000 + b'}', 'not valid JSON'),
    (b'[' * 10**5, 'nested too deeply'),
    (b'{"prompt": ' * 10**4, 'nested too deeply'),
    (b'{"prompt": "na\xefve"}', 'the text is not UTF-8 .byte 0xef'),
    (b'{"prompt": "a\0b"}', 'contains a NUL character'),
    (b'{"prompt": "\\u0000"}', 'NUL'),
    (b'{"prompt": "\\ud83d"}', 'unpaired surrogate'),
    (b'{"prompt": "\\ude00\\ud83d"}', 'unpaired surrogate'),
    (b'{"prompt": "\x1b[2J', r'\\x1b\[2J'),
    (b'{"prompt": "a"} {"prompt": "b"}', 'Extra data'),
    (b'null', 'A row must be an object'),
    (b'x' * (2**24 + 2), 'more than 16777216 characters'),
  ],
)
def test_errors_in_lines_name_the_line_and_are_short(tmp_path, line, message):
  path = write(tmp_path, 'p.jsonl', b'{"prompt": "fine"}\n\n' + line + b'\n')
  with pytest.raises(UserError, match=message) as error:
    read(path)
  assert f'{path}, line 3: ' in str(error.value)
  assert len(str(error.value)) < 800 and str(error.value).isprintable()


def test_paths_that_are_no_text_files_are_refused_at_once(tmp_path):
  os.mkfifo(tmp_path / 'pipe.jsonl')
  (tmp_path / 'folder.jsonl').mkdir()
  (tmp_path / 'loop.jsonl').symlink_to(tmp_path / 'loop.jsonl')
  (tmp_path / 'zero.jsonl').symlink_to('/dev/zero')
  (tmp_path / 'huge.jsonl').touch()
  os.truncate(tmp_path / 'huge.jsonl', 2**40)  # takes no space
  write(tmp_path, 'zip.jsonl', b'PK\x03\x04x')
  write(tmp_path, 'bz2.jsonl', bz2.compress(b'{"prompt": "a"}'))
  write(tmp_path, 'bomb.jsonl.gz', gzip.compress((b' ' * 2**20 + b'{"prompt": "a"}\n') * 64))
  write(tmp_path, 'blank.jsonl.gz', gzip.compress(b'\n' * 2**24))
  write(tmp_path, 'cut.csv.gz', gzip.compress(b'prompt\n' + os.urandom(99))[:-9])
  write(tmp_path, 'no16.jsonl', LINES.encode('utf-16-le'))
  write(tmp_path, 'odd.jsonl', LINES.encode('utf-16') + b'x')
  for name, message in [
    ('pipe.jsonl', 'is a pipe or a device'),
    ('folder.jsonl', 'is a folder'),
    ('loop.jsonl', 'there is no such file'),
    ('zero.jsonl', 'is a pipe or a device'),
    ('huge.jsonl', 'line 1: the line has more than'),
    ('no\0.jsonl', 'there is no such file'),
    ('n' * 300 + '.jsonl', 'there is no such file'),
    ('zip.jsonl', 'is a zip archive'),
    ('bz2.jsonl', 'compressed with bzip2'),
    ('bomb.jsonl.gz', 'expands to more than'),
    ('blank.jsonl.gz', 'more than 100000 blank lines'),
    ('cut.csv.gz', 'the gzip file is damaged'),
    ('no16.jsonl', 'UTF-16 without a byte order mark'),
    ('odd.jsonl', 'odd.jsonl, after line .: the text is not UTF-16'),
    ('\x1b[2J.jsonl', r'\\x1b\[2J.jsonl: there is no such file'),
  ]:
    with pytest.raises(UserError, match=message):
      read(tmp_path / name)
