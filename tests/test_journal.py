"""The turn journal: stored turns are complete after a kill, and writing them takes no memory."""

import dataclasses
import json
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
  logprobs = [float(np.float32(-0.1 * i)) for i in (1, 3)]
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


def without_checksums(folder):
  """Rewrite a journal in the form of version 0.1.0."""
  path = folder / 'turns-00000.jsonl'
  lines = (json.loads(line) for line in path.open())
  lines = ({name: line[name] for name in ('keys', 'turns')} for line in lines)
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))


def test_lines_without_checksums_are_found_and_new_ones_have_one(tmp_path):
  write_journal(tmp_path, 'ab')
  without_checksums(tmp_path)
  journal = Journal(tmp_path)
  journal.put(turns('c'))
  assert contains(journal, 'ab') and contains(Journal(tmp_path, 1), 'abc')
  assert journal.num_faults == 0 and journal.describe_faults() == ''
  lines = (tmp_path / 'turns-00000.jsonl').read_text().splitlines()
  assert ['checksum' in json.loads(line) for line in lines] == [False, False, True]


FAULTS = [
  (b'{"keys": ["b/0", ', b'not json'),
  (b'"turns": [{"tokens": [1, 0]', b'"turns": [{"tokens": [1, 0'),
  (b'"keys": ["b/0", ', b'"keys": ['),
  (b'"keys": ["b/0", ', b'"keys": [7, '),
  (b'"keys": ["b/0", ', b'"keys": [{}, '),
  (b'"keys": ["b/0", ', b'"keys": [' + b'1' * 5000 + b', '),
  (b'"keys": ["b/0", ', b'"keys": [' + b'[' * 3000 + b', '),
  (b'"turns": [{"tokens": [1, 0]', b'"turns": [{"tokens": [1, ' + b'1' * 5000 + b']'),
  (b'"turns": [{"tokens": [1, 0]', b'"turns": [{"tokens": ' + b'[' * 3000 + b']'),
  (b'"turns": ', b'"turn": '),
  (b'"turns": [{"tokens": [1, 0]', b'"turns": [7, {"tokens": [1, 0]'),
]


@pytest.mark.parametrize(('old', 'new'), FAULTS)
@pytest.mark.parametrize('version', ['0.1.0', 'now'])
def test_a_damaged_line_counts_as_absent_and_is_named(tmp_path, old, new, version):
  write_journal(tmp_path, 'abc')
  if version == '0.1.0':
    without_checksums(tmp_path)
  path = tmp_path / 'turns-00000.jsonl'
  lines = path.read_bytes().splitlines(keepends=True)
  assert lines[1].count(old) == 1
  path.write_bytes(lines[0] + lines[1].replace(old, new) + lines[2])
  journal = Journal(tmp_path)
  assert contains(journal, 'ac') and not any(journal.get(key) for key, _ in turns('b'))
  assert 1 <= journal.num_faults <= 3  # lines of 0.1.0 are read turn by turn
  assert 'turns-00000.jsonl, line 2: ' in journal.describe_faults()
  journal.put(turns('b'))
  assert contains(Journal(tmp_path, 1), 'abc')


@pytest.mark.parametrize(
  ('field', 'value', 'reason'),
  [
    ('tokens', [1, 384, 1, 1], 'outside the vocabulary'),
    ('tokens', [1, -1, 1, 1], 'outside the vocabulary'),
    ('tokens', [1, 1.0, 1, 1], 'not integers'),
    ('tokens', [1, True, 1, 1], 'not integers'),
    ('tokens', [1, None, 1, 1], 'not integers'),
    ('tokens', 'aaaa', 'not integers'),
    ('tokens', [1], '1 tokens and 4 log-probabilities'),
    ('logprobs', [], '4 tokens and 0 log-probabilities'),
    ('logprobs', None, 'not numbers'),
    ('logprobs', [0.0, '0', 0.0, 0.0], 'not numbers'),
    ('logprobs', [0.0, float('inf'), 0.0, 0.0], 'not finite'),
    ('logprobs', [0.0, float('nan'), 0.0, 0.0], 'not finite'),
    ('text', None, 'not text'),
    ('text', '\ud800', 'not text'),
    ('finish_reason', 'end', 'unknown'),
    ('finish_reason', [], 'unknown'),
    ('other', 1, 'exactly the fields'),
    (None, None, 'exactly the fields'),
  ],
)
def test_a_turn_that_the_model_cannot_have_sampled_counts_as_absent(tmp_path, field, value, reason):
  good = {'tokens': [1, 2, 3, 383], 'text': 'a', 'logprobs': [-0.1] * 4, 'finish_reason': 'stop'}
  bad = 7 if field is None else good | {field: value}
  line = json.dumps({'keys': ['bad', 'good'], 'turns': [bad, good]})
  (tmp_path / 'turns-00000.jsonl').write_text(line + '\n')
  journal = Journal(tmp_path)
  assert journal.get('bad', 384, finite=True) is None
  assert 'line 1' in journal.describe_faults() and reason in journal.describe_faults()
  assert journal.get('good', 384, finite=True) == Completion(**good)


def test_a_served_model_may_not_know_its_log_probabilities(tmp_path):
  journal = Journal(tmp_path)
  journal.put([('a', Completion([1], 'a', [float('nan')], 'stop'))])
  journal.put([('b', Completion([], '', [], 'content_filter'))])
  journal.refresh()
  assert np.isnan(journal.get('a', 384).logprobs) and journal.get('b', 384) is not None
  assert journal.get('a', 384, finite=True) is None and journal.num_faults == 1


@pytest.mark.parametrize('place', ['start', 'middle', 'text', 'checksum'])
def test_any_changed_byte_of_a_line_is_found(tmp_path, place):
  write_journal(tmp_path, 'ab')
  path = tmp_path / 'turns-00000.jsonl'
  content = bytearray(path.read_bytes())
  index = {'start': 12, 'middle': 150, 'text': content.index(b'u00e9'), 'checksum': -5}[place]
  content[index] = ord('7') if content[index] != ord('7') else ord('8')
  path.write_bytes(content)
  journal = Journal(tmp_path)
  assert journal.num_faults == 1 and 'checksum does not match' in journal.describe_faults()
  assert contains(journal, 'a' if place == 'checksum' else 'b')


def test_a_checksum_that_was_removed_is_missed_in_a_file_that_has_some(tmp_path):
  write_journal(tmp_path, 'abc')
  path = tmp_path / 'turns-00000.jsonl'
  lines = path.read_text().splitlines()
  lines[1] = lines[1][: lines[1].index(', "checksum"')].replace('stop', 'length') + '}'
  path.write_text('\n'.join(lines) + '\n')
  journal = Journal(tmp_path)
  assert contains(journal, 'ac') and journal.get('b/0') is None
  assert 'line 2: it is cut short, or its checksum is missing' in journal.describe_faults()


def test_lines_that_run_into_each_other_and_strange_files_are_no_error(tmp_path):
  write_journal(tmp_path, 'abc')
  path = tmp_path / 'turns-00000.jsonl'
  lines = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(lines[0] + lines[1][:40] + lines[2] + b'\n' + lines[2] + b'\0' * 100)
  (tmp_path / 'turns-folder.jsonl').mkdir()
  (tmp_path / 'turns-00003.jsonl').write_bytes(b'\xff\n' * 9)
  journal = Journal(tmp_path)
  assert contains(journal, 'ac') and journal.get('b/0') is None
  assert journal.num_faults == 1 + 1 + 9 + 1 and '; and 9 more' in journal.describe_faults()
  assert path.read_bytes().endswith(lines[2])


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


def test_a_journal_that_another_sampler_began_is_refused(tmp_path):
  write_journal(tmp_path, 'a')
  journal_lib.check_sampler(tmp_path)
  next(tmp_path.glob('sampler-*')).unlink()
  with pytest.raises(UserError, match='holds turns of another sampler .* Start in another workdir'):
    journal_lib.check_sampler(tmp_path)
  write_journal(tmp_path, 'b')  # as for served models, whose turns no sampler of ours drew
  with pytest.raises(UserError, match='another sampler'):
    journal_lib.check_sampler(tmp_path)


def test_a_new_or_empty_folder_belongs_to_this_sampler(tmp_path):
  journal_lib.check_sampler(tmp_path / 'absent')
  (tmp_path / 'turns-00003.jsonl').touch()  # of a process that was killed before its first turn
  write_journal(tmp_path, 'a')
  journal_lib.check_sampler(tmp_path)


def test_the_digest_depends_on_everything_that_determines_a_reply():
  base = dict(
    fingerprint='m',
    context=[1, 256],
    sampling=SamplingConfig(),
    stop=((2,), ('x',)),
    key=b'k',
    sampler='a',
  )
  changes = dict(
    fingerprint='n',
    context=[257, 0],
    sampling=SamplingConfig(top_k=3),
    stop=((2,), ('y',)),
    key=b'l',
    sampler='b',
  )
  changed = [base | {name: value} for name, value in changes.items()]
  changed.append(base | {'context': [1]})
  changed.append(base | {'sampling': SamplingConfig(max_tokens=9)})
  assert len({journal_lib.digest(**arguments) for arguments in (base, *changed)}) == 9


# For each type of a setting's default, values that are not neutral.
OTHER_VALUES = {
  bool: (True, False),
  int: (3, 4),
  float: (0.5, 0.75),
  str: ('a', 'b'),
  tuple: ((5,), (5, 6)),
  type(None): (1, 2),
}
SAMPLING_FIELDS = {field.name: field.default for field in dataclasses.fields(SamplingConfig)}


def key_of(**settings):
  """Return the key of a turn with some sampling settings, as the engine makes it."""
  # The fields of `stop` are checked on building, but not their use in a key.
  sampling = SamplingConfig()
  for name, value in settings.items():
    object.__setattr__(sampling, name, value)
  stop = sampling.stop_token_ids, sampling.stop
  return journal_lib.digest('m', [1, 2], sampling, stop, b'k', sampler='')


@pytest.mark.parametrize('name', SAMPLING_FIELDS)
def test_every_value_of_every_setting_has_its_own_key_and_the_default_the_old_one(name):
  default = SAMPLING_FIELDS[name]
  others = [value for value in OTHER_VALUES[type(default)] if value != default]
  keys = [key_of(**{name: value}) for value in (default, *others)]
  assert len(set(keys)) == len(keys)
  assert keys[0] == '9c42db70f7d4064299a3459fd881f762'  # of version 0.1.0


def test_a_setting_that_is_added_is_part_of_the_key_unless_it_has_its_default(monkeypatch):
  monkeypatch.setattr(journal_lib, '_OTHERS', (('min_p', 0.0), ('logit_bias', ())))
  old = key_of(min_p=0.0, logit_bias=())
  assert old == key_of(min_p=0, logit_bias=()) == '9c42db70f7d4064299a3459fd881f762'
  changed = [key_of(min_p=0.1, logit_bias=()), key_of(min_p=0.0, logit_bias=((1, 0.5),))]
  assert len({old, *changed}) == 3
