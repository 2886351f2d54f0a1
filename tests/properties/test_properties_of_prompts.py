"""Any bytes in a file of prompts give prompts or a UserError that names the file."""

import csv
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import Fault, Reader, check_reader

from cai_jax.data.prompts import PromptSource, load_prompts

U = {'role': 'user', 'content': 'How do I bake? \u00e9'}
A = {'role': 'assistant', 'content': 'Like this.'}
S = {'role': 'system', 'content': 'Be kind.'}
ROWS = [
  {'prompt': 'How do I fry?', 'id': 'a', 'metadata': {'kind': 'x'}},
  {'messages': [S, U, A, U], 'id': 7},
  {'prompt': '\n\nHuman: hi\n\nAssistant: yes\n\nHuman: and?\n\nAssistant:'},
  {'chosen': '\n\nHuman: hi\n\nAssistant: yes', 'rejected': '\n\nHuman: hi\n\nAssistant: no'},
  {'conversations': [{'from': 'human', 'value': 'hi'}], 'system': 'Be kind.'},
  {'messages': [{'role': 'user', 'content': [{'type': 'text', 'text': 'hi there'}]}, A, U]},
  {'prompt': U['content'], 'messages': [U, A]},
]
FRAGMENTS = [
  b'\\n\\nHuman: ', b'\\n\\nAssistant:', b'Human:', b'\\nAssistant: ', b'<|im_start|>', b'User: ',
  b'"messages": null, ', b'"prompt": "x", ', b'"role": "tool"', b'"id": 3, ', b'prompt,', b'\t',
]  # fmt: skip


def lines(rows):
  return ''.join(json.dumps(row) + '\n' for row in rows)


def table(delimiter):
  file = io.StringIO()
  writer = csv.writer(file, delimiter=delimiter)
  writer.writerow(['id', 'prompt', 'messages', 'metadata'])
  writer.writerow(['a', 'one, "two"\n\nthree', '', '{"kind": "x"}'])
  writer.writerow(['b', '', json.dumps([U, A, U]), ''])
  return file.getvalue()


def parquet(rows):
  buffer = io.BytesIO()
  pq.write_table(pa.Table.from_pylist(rows), buffer)
  return buffer.getvalue()


def check(files, prompts):
  assert prompts and len({prompt.id for prompt in prompts}) == len(prompts)
  for prompt in prompts:
    roles = [message['role'] for message in prompt.messages]
    turns = roles[roles[0] == 'system' :]
    assert turns == (['user', 'assistant'] * len(turns))[: len(turns)] and turns[-1] == 'user'
    for message in prompt.messages:
      assert set(message) == {'role', 'content'} and message['content'].strip()
      message['content'].encode()  # fails for half a surrogate pair
      assert '\0' not in message['content']
    json.dumps([prompt.id, prompt.metadata]).encode()
    assert all(isinstance(value, str) for value in prompt.metadata.values())
  ((name, data),) = files.items()
  if name.endswith('.jsonl'):
    _check_lines(data, prompts)


def _check_lines(data, prompts):
  """Check that no row is lost, and that each text comes from its own line."""
  if data[:2] in (b'\xff\xfe', b'\xfe\xff', b'\x1f\x8b'):
    return
  text = data.decode('utf-8-sig').replace('\r\n', '\n').replace('\r', '\n')
  rows = [line for line in text.split('\n') if line.strip()]
  assert len(prompts) == len(rows)
  for prompt, line in zip(prompts, rows, strict=True):
    row = json.loads(line, object_pairs_hook=lambda pairs: dict(pairs[::-1]))
    contents = json.dumps(row, ensure_ascii=False)
    for message in prompt.messages:
      for word in message['content'].split():
        assert json.dumps(word, ensure_ascii=False)[1:-1] in contents.replace('\\\\', '\\') or (
          json.dumps(word, ensure_ascii=False)[1:-1] in contents
        )
    if 'id' in row:
      assert prompt.id == str(row['id']) and type(row['id']) in (str, int)


def check_refusal(files, message):
  places = ('line ', 'row ', 'the source is empty', 'no such file', 'gzip', 'not a JSON array')
  assert any(place in message for place in (*places, 'Parquet', 'compressed', 'archive'))


def reader(name, *contents):
  inputs = [{name: c if isinstance(c, bytes) else c.encode()} for c in contents]

  def read(folder):
    return load_prompts(PromptSource(str(folder / name)))

  return Reader(inputs, read, check, check_refusal, FRAGMENTS)


JSONL = reader('prompts.jsonl', lines(ROWS), *(lines([row]) for row in ROWS))
ARRAY = reader('prompts.json', json.dumps(ROWS, indent=1), lines(ROWS))
CSV = reader('prompts.csv', table(','), table(',').encode('utf-16'))
TSV = reader('prompts.tsv', table('\t'))
TEXT = reader('prompts.txt', 'How do I fry?\n\nHuman: how do I bake?\n')
PARQUET = reader('prompts.parquet', parquet(ROWS[:1]), parquet([{'messages': [U, A, U]}] * 3))
GZIP = reader('prompts.jsonl.gz', gzip.compress(lines(ROWS).encode(), mtime=0))
# Small inputs, of which a mutation more often hits the place of a planted fault.
TEXT_ROW = reader('prompts.jsonl', lines([{'prompt': 'How?', 'id': 'a'}]))
TWO_ROWS = reader('prompts.json', json.dumps([{'prompt': p, 'id': p} for p in ('How?', 'Why?')]))
READERS = ['JSONL', 'ARRAY', 'CSV', 'TSV', 'TEXT', 'PARQUET', 'GZIP', 'TEXT_ROW', 'TWO_ROWS']


@pytest.mark.parametrize('name', READERS)
def test_prompt_files(name):
  check_reader(f'{__name__}:{name}')


DIALOGUES, PROMPTS = 'cai_jax.data.dialogues', 'cai_jax.data.prompts'
ROWS = 'cai_jax.data.row_form'
FILES, TEXT_FILES = 'cai_jax.data.prompt_files', 'cai_jax.runtime.text_files'
FAULTS = [
  Fault(f'{__name__}:{reader}', module, old, new)
  for reader, module, old, new in [
    ('JSONL', TEXT_FILES, 'except RecursionError as error:', 'except KeyError as error:'),
    ('TEXT_ROW', TEXT_FILES, "if '\\0' in text:", "if '\\0' in text and len(text) > 9:"),
    ('TEXT_ROW', TEXT_FILES, 'if _SURROGATE.search(text):', 'if len(text) > 10**6:'),
    ('TEXT_ROW', DIALOGUES, 'or not content.strip():', 'or content is None:'),
    ('TEXT_ROW', ROWS, "not isinstance(value, str | int) or value == ''", "value == ''"),
    ('TWO_ROWS', PROMPTS, '    if row.has_id and row.prompt.id in places:', '    if False:'),
    ('CSV', FILES, 'if len(cells) != len(columns):', 'if len(cells) > len(columns) + 9:'),
    ('CSV', FILES, 'except csv.Error as error:', 'except KeyError as error:'),
    ('PARQUET', FILES, '(pa.ArrowException, OSError, MemoryError,', '(KeyError, MemoryError,'),
    ('GZIP', TEXT_FILES, '(EOFError, gzip.BadGzipFile, zlib.error)', 'gzip.BadGzipFile'),
  ]
]
