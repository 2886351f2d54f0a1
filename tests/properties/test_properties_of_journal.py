"""Any bytes in a journal are turns that were sampled or counted faults; never an error."""

import json
import math
import pathlib
import re
import tempfile

from harness import Fault, Reader, check_reader

from cai_jax.sampling.journal import Journal
from cai_jax.sampling.types import FINISH_REASONS, Completion

VOCAB_SIZE = 384
TURNS = {
  'a0': Completion([1, 383], 'Yes.', [-0.25, -1.5], 'stop'),
  'a1': Completion([7], 'é\n', [-0.125], 'stop_text'),
  'b0': Completion([5, 6, 7], 'No', [-0.5, 0.0, -2.75], 'length'),
}
NAME = 'turns-00000.jsonl'


def write_journal():
  """Return the file of a journal with two lines."""
  with tempfile.TemporaryDirectory() as folder:
    journal = Journal(folder)
    for chain in ('a', 'b'):
      journal.put([(key, turn) for key, turn in TURNS.items() if key.startswith(chain)])
    journal.close()
    return (pathlib.Path(folder) / NAME).read_bytes()


NEW = write_journal()
OLD = re.sub(rb', "checksum": "[0-9a-f]{8}"', b'', NEW)  # as version 0.1.0 wrote it


def read(folder):
  journal = Journal(folder)
  found = {key: journal.get(key, VOCAB_SIZE, finite=True) for key in TURNS}
  journal.put([('c0', TURNS['a0'])])
  journal.refresh()
  assert journal.get('c0') == TURNS['a0']
  return found, journal.num_faults


def check(files, value):
  found, num_faults = value
  content = files.get(NAME, b'')
  for key, turn in found.items():
    if turn is None:
      assert num_faults or key.encode() not in content, f'{key} is lost without a word'
      continue
    assert all(type(token) is int and 0 <= token < VOCAB_SIZE for token in turn.tokens)
    assert len(turn.logprobs) == len(turn.tokens) and all(map(math.isfinite, turn.logprobs))
    turn.text.encode()
    assert turn.finish_reason in FINISH_REASONS
    lines = content.splitlines(keepends=True)
    unchecked = [line for line in lines if not re.search(rb', "checksum": "\w{8}"}\n$', line)]
    assert turn == TURNS[key] or any(key.encode() in line for line in unchecked)


JOURNAL = Reader(inputs=[{NAME: NEW}, {NAME: OLD}, {NAME: OLD + NEW}], read=read, check=check)


def test_journals():
  assert json.loads(OLD.splitlines()[0]).keys() == {'keys', 'turns'}
  check_reader(f'{__name__}:JOURNAL')


FILES, LINES = 'cai_jax.sampling.journal', 'cai_jax.sampling.journal_lines'
FAULTS = [
  Fault(f'{__name__}:JOURNAL', module, old, new)
  for module, old, new in (
    (LINES, 'if line[-_END_SIZE + len(_CHECKSUM) :] != checksum', 'if line[:1] == checksum'),
    (LINES, 'not {int}.issuperset(map(type, tokens))', 'not tokens == tokens'),
    (LINES, 'if len(logprobs) != len(tokens):', 'if len(logprobs) > len(tokens):'),
    (FILES, ' and len(keys) == len(turns)', ''),
    (LINES, 'not isinstance(text, str) or ', ''),
    (LINES, "if turn['finish_reason'] not in FINISH_REASONS:", 'if not turn:'),
    (
      FILES,
      'RecursionError, KeyError, TypeError):\n        is_',
      'KeyError, TypeError):\n        is_',
    ),
    (FILES, "self._add_fault(own, self._lines[file] + 1, 'it is cut short')", 'pass'),
  )
]
