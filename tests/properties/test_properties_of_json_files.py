"""Any bytes in a JSON file of a run's folder give its value or a UserError that names the file."""

import json

import pytest
from harness import Fault, Reader, Violation, check_reader

from cai_jax.runtime.files import read_json


def check(files, value):
  # NaN differs from itself, and JSON text does not.
  assert json.dumps(value) == json.dumps(json.loads(files['summary.json']))


JSON = Reader(
  inputs=[{'summary.json': b'{"rounds": [1.5, null], "name": "\\u00e9"}'}],
  read=lambda folder: read_json(folder / 'summary.json'),
  check=check,
)
FAULTS = [
  Fault(
    f'{__name__}:JSON',
    'cai_jax.runtime.files',
    "except OSError as error:\n    raise UserError(f'{path} cannot",
    "except ZeroDivisionError as error:\n    raise UserError(f'{path} cannot",
  ),
  Fault(f'{__name__}:JSON', 'cai_jax.runtime.files', '(ValueError, RecursionError)', 'ValueError'),
]


def test_json_files():
  check_reader(f'{__name__}:JSON')


def hang(folder):
  while True:
    pass


HANG = Reader(inputs=[{'a': b''}], read=lambda folder: (folder / 'a').read_bytes() and hang(folder))
MEMORY = Reader(
  inputs=[{'a': b''}], read=lambda folder: [0] * (2**28 * (folder / 'a').stat().st_size)
)
CRASH = Reader(
  inputs=[{'a': b''}], read=lambda folder: (folder / 'a').read_bytes() and __import__('os')._exit(3)
)
WRONG = Reader(
  inputs=[{'a': b''}],
  read=lambda folder: b'',
  check=lambda files, value: pytest.fail() if files.get('a', b'') != value else None,
)


@pytest.mark.parametrize('name', ['HANG', 'MEMORY', 'CRASH', 'WRONG'])
def test_the_harness_finds_readers_that_hang_or_take_memory_or_crash_or_lose_data(
  name, monkeypatch
):
  monkeypatch.setattr('harness.SECONDS', 1.0)
  with pytest.raises(Violation):
    check_reader(f'{__name__}:{name}', examples=20, expected=True)
