"""The turn journal: stored turns are complete after a kill, and writing them takes no memory."""

import subprocess
import sys
import textwrap
import tracemalloc

import numpy as np
import pytest

from cai_jax.runtime.errors import StoppedError, UserError
from cai_jax.sampling import journal as journal_lib
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.types import Completion, SamplingConfig


def turns(name, count=3):
  """Return `count` (key, completion) pairs, with log-probabilities that need all their digits."""
  logprobs = [float(np.float32(-0.1 * i)) for i in range(4)]
  return [(f'{name}/{i}', Completion([1, i], f'é\n{i}', logprobs, 'stop')) for i in range(count)]


def write_journal(folder, names, process=0):
  journal = Journal(folder, process)
  for name in names:
    journal.put(turns(name))
  journal.close()


def contains(journal, names):
  return all(journal.get(key) == turn for name in names for key, turn in turns(name))


def test_the_next_run_finds_the_turns_of_all_processes(tmp_path):
  write_journal(tmp_path, 'ab')
  write_journal(tmp_path, 'cd', process=7)
  for process in (0, 1):
    journal = Journal(tmp_path, process)
    assert contains(journal, 'abcd') and len(journal) == 12
    assert journal.get('e/0') is None


def test_refresh_finds_new_turns_of_all_processes(tmp_path):
  mine, other = Journal(tmp_path), Journal(tmp_path, 1)
  mine.put(turns('a'))
  other.put(turns('b'))
  assert mine.get('a/0') is None and len(mine) == 3
  mine.refresh()
  assert contains(mine, 'ab') and len(mine) == 6
  mine.put(turns('c'))
  other.put(turns('d'))
  mine.refresh()
  mine.refresh()
  assert contains(mine, 'abcd') and len(mine) == 12


def test_keys_with_equal_hashes_are_distinguished(tmp_path, monkeypatch):
  monkeypatch.setattr(journal_lib, 'hash', lambda key: len(key), raising=False)
  write_journal(tmp_path, 'abcd')
  journal = Journal(tmp_path)
  assert contains(journal, 'dbca')
  assert journal.get('e/0') is None and journal.get('longer') is None


def test_a_truncated_line_is_dropped_as_a_whole(tmp_path):
  write_journal(tmp_path, 'ab')
  path = tmp_path / 'turns-00000.jsonl'
  whole = path.read_bytes()
  first = whole.index(b'\n') + 1
  for cut in (first + 1, first + 30, len(whole) - 3, len(whole) - 1):
    path.write_bytes(whole[:cut])
    assert len(Journal(tmp_path, process=1)) == 3  # another process's file is not changed
    assert path.stat().st_size == cut
    journal = Journal(tmp_path)
    assert contains(journal, 'a') and journal.get('b/0') is None
    journal.put(turns('c'))
    assert contains(Journal(tmp_path, process=1), 'ac')


@pytest.mark.parametrize(
  ('old', 'new'),
  [
    (b'{"keys": ["b/0", ', b'not json'),
    (b'"turns": [{"tokens": [1, 0]', b'"turns": [{"tokens": [1, 0'),
    (b'"keys": ["b/0", ', b'"keys": ['),
    (b'"keys": ["b/0", ', b'"keys": [' + b'1' * 5000 + b', '),
    (b'"turns": [{"tokens": [1, 0]', b'"turns": [{"tokens": [1, ' + b'1' * 5000 + b']'),
    (b'"turns": ', b'"turn": '),
  ],
)
def test_the_error_for_a_damaged_line_names_it(tmp_path, old, new):
  write_journal(tmp_path, 'abc')
  path = tmp_path / 'turns-00000.jsonl'
  lines = path.read_bytes().splitlines(keepends=True)
  assert lines[1].count(old) == 1
  path.write_bytes(lines[0] + lines[1].replace(old, new) + lines[2])
  with pytest.raises(UserError, match='turns-00000.jsonl, line 2 is not a journal entry'):
    Journal(tmp_path).get('b/1')


def test_put_takes_no_memory_and_the_index_takes_twenty_bytes_per_turn(tmp_path):
  journal = Journal(tmp_path)
  long = [(f'{i:064}', Completion([7] * 50, 'x' * 100, [-1.0] * 50, 'stop')) for i in range(5)]
  journal.put(long)
  tracemalloc.start()
  for number in range(2000):
    journal.put([(f'{number}{key}', turn) for key, turn in long])
  used = tracemalloc.get_traced_memory()[0]
  tracemalloc.stop()
  assert used < 100_000  # less than 10 bytes for each of 10,000 turns
  journal.refresh()
  columns = journal._hashes, journal._files, journal._offsets
  assert sum(column.nbytes for column in columns) == 20 * len(journal) == 20 * 10_005
  assert journal.get('1999' + long[4][0]) == long[4][1]


def test_a_killed_process_loses_no_stored_turn(tmp_path):
  code = f"""
    import os, signal, sys
    sys.path[:0] = {sys.path!r}
    from tests.test_journal import Journal, turns
    journal = Journal({str(tmp_path)!r})
    for name in 'abcd':
      journal.put(turns(name))
    os.kill(os.getpid(), signal.SIGKILL)
  """
  done = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], timeout=120)
  assert done.returncode == -9
  assert contains(Journal(tmp_path), 'abcd')


def test_a_full_disk_is_an_error(tmp_path):
  journal = Journal(tmp_path)
  journal._file.close()
  with (
    open('/dev/full', 'ab', buffering=0) as journal._file,
    pytest.raises(StoppedError, match='full cannot be used: No space left'),
  ):
    journal.put(turns('a'))


def test_the_digest_depends_on_everything_that_determines_a_reply():
  base = dict(
    fingerprint='m', context=[1, 256], sampling=SamplingConfig(), stop=((2,), ('x',)), key=b'k'
  )
  changes = dict(
    fingerprint='n',
    context=[257, 0],
    sampling=SamplingConfig(top_k=3),
    stop=((2,), ('y',)),
    key=b'l',
  )
  changed = [base | {name: value} for name, value in changes.items()]
  changed.append(base | {'context': [1]})
  changed.append(base | {'sampling': SamplingConfig(max_tokens=9)})
  assert len({journal_lib.digest(**arguments) for arguments in (base, *changed)}) == 8
