"""Any change of a D_CAI's files gives its rows or an error that names a file."""

import pathlib
import tempfile

from harness import Fault, Reader, check_reader

from cai_jax.data import d_cai


def make_row(number):
  turn = {'text': f'Answer {number}', 'finish_reason': 'stop', 'logprob': -0.5, 'num_tokens': 1}
  message = {'role': 'user', 'content': f'Question {number}'}
  step = {'principle': 'kind', 'critique': turn, 'revision': turn}
  models = {name: 'tiny' for name in ('model', 'critique_model', 'revision_model')}
  return models | {
    'id': f'row {number}',
    'kind': 'harmful',
    'prompt': [message],
    'metadata': '{}',
    'initial': turn,
    'rounds': [step, step],
    'logprobs': [-0.5] * 5,
    'seed': 0,
    'constitution': 'ab12',
  }


ROWS = [make_row(number) for number in range(4)]


def write_dataset():
  """Return the files of a dataset of two shards."""
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    for shard in (0, 1):
      d_cai.write_shard(folder, shard, ROWS[2 * shard : 2 * shard + 2])
    d_cai.write_metadata(folder, [2, 2])
    d_cai.write_checksums(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


FILES = write_dataset()


def read(folder):
  d_cai.check_schema(folder)
  rows = d_cai.read_rows(folder)
  return [rows[index] for index in range(len(rows))]


def check(files, value):
  if files.get(d_cai.CHECKSUMS) == FILES[d_cai.CHECKSUMS]:
    assert value == ROWS
    assert all(files.get(name) == data for name, data in FILES.items())
  assert all(row.keys() >= ROWS[0].keys() for row in value)


OLD = {name: data for name, data in FILES.items() if name != d_cai.CHECKSUMS}  # of version 0.1.0
DATASET = Reader(inputs=[FILES, OLD], read=read, check=check, names_file=False)


def test_datasets():
  check_reader(f'{__name__}:DATASET')


FAULTS = [
  Fault(f'{__name__}:DATASET', f'cai_jax.data.{module}', old, new)
  for module, old, new in (
    (
      'd_cai',
      'elif digest_file(folder / name) != expected[name]:',
      'elif not digest_file(folder / name):',
    ),
    ('d_cai', 'elif not os.path.isfile(folder / name):', 'elif not name:'),
    (
      'd_cai_rows',
      '  except Exception as error:  # of parsers, for a file',
      '  except ImportError as error:  #',
    ),
    (
      'd_cai',
      "    if name not in expected:\n      fault = 'does not belong to it'\n    elif",
      '    if',
    ),
    (
      'd_cai_rows',
      "    except Exception as error:  # as above\n      raise damaged(self.folder, f'row",
      "    except ImportError as error:\n      raise damaged(self.folder, f'row",
    ),
    ('d_cai', 'if actual.get(name) != kind)', 'if not kind)'),
  )
]
