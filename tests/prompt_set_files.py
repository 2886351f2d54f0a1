"""Files of the exact form of each published prompt set, with invented texts, and their copies.

tests/data/sets has one file a set, as its publisher gives it, with eight rows.
"""

import csv
import gzip
import json
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq

from cai_jax.data.prompt_sources import PromptSource
from cai_jax.data.prompts import load_prompts
from cai_jax.data.sets import PROMPT_SETS

FILES = {
  path.name.partition('.')[0]: path for path in pathlib.Path(__file__).parent.glob('data/sets/*')
}
FORMATS = ('csv', 'jsonl.gz', 'parquet', 'saved', 'snapshot')


def read(path):
  """Return the rows of a file of tests/data/sets."""
  text = path.read_text(encoding='utf-8')
  if path.suffix == '.jsonl':
    return json.loads(text) if text[0] == '[' else [json.loads(x) for x in text.splitlines()]
  with open(path, encoding='utf-8', newline='') as file:
    return list(csv.DictReader(file, delimiter='\t' if path.suffix == '.tsv' else ','))


def load(name, path=None, seed=0, **settings):
  """Return the prompts of a set, by default of its file in tests/data/sets."""
  path = FILES[name] if path is None else path
  return load_prompts(PromptSource(source=name, path=str(path), **settings), seed)


def last(prompt):
  """Return the text of a prompt's last message."""
  return prompt.messages[-1]['content']


def write(path, rows):
  """Write rows as JSON Lines and return the path."""
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


def write_copy(name, form, folder):
  """Write a copy of a set's file in another format, and return its path."""
  rows = read(FILES[name])
  folder.mkdir(parents=True, exist_ok=True)
  if form == 'saved':
    import datasets

    path = folder / 'saved'
    entry = PROMPT_SETS[name]
    info = datasets.DatasetInfo(config_name=(*entry.subsets, None)[0])
    saved = datasets.Dataset.from_list(rows, info=info)
    datasets.DatasetDict({entry.splits[0]: saved}).save_to_disk(str(path))
    return path
  if form == 'snapshot':
    return _write_snapshot(name, rows, folder / 'snapshot')
  path = folder / f'{name}.{form}'
  _write(rows, path)
  return path


def _write(rows, path):
  if path.suffix == '.parquet':
    pq.write_table(pa.Table.from_pylist(rows), path)
  elif path.suffix in ('.csv', '.tsv'):
    with open(path, 'w', encoding='utf-8', newline='') as file:
      writer = csv.DictWriter(file, list(rows[0]), delimiter='\t' if path.suffix == '.tsv' else ',')
      writer.writeheader()
      for row in rows:  # a cell holds a list as JSON, and null as nothing
        writer.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()})
  else:
    data = ''.join(json.dumps(row) + '\n' for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)


def _write_snapshot(name, rows, folder):
  """Write the files of a set's hub repository for its first subset and split."""
  entry = PROMPT_SETS[name]
  path = folder / entry.file.replace('*', '00000-of-00001')
  path.parent.mkdir(parents=True)
  _write(rows, path)
  if 'data_dir' not in entry.options:
    config = (
      '---\nconfigs:\n'
      f'- config_name: {(entry.subsets or ("default",))[0]}\n'
      f'  data_files:\n  - split: {entry.splits[0]}\n    path: {path.relative_to(folder)}\n---\n'
    )
    (folder / 'README.md').write_text(config)
  return folder
