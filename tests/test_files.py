"""Files are written whole or not at all, and a fault of the machine is reported in one line."""

import errno
import os

import pytest

from cai_jax import cli
from cai_jax.data import d_cai
from cai_jax.runtime.errors import StoppedError
from cai_jax.runtime.files import describe_fault, make_folder, replacing, write_json, writing
from cai_jax.sampling.journal import Journal
from cai_jax.training.tensorboard import EventWriter


@pytest.mark.parametrize(
  ('number', 'advice'),
  [
    (errno.ENOSPC, 'Free some space'),
    (errno.EDQUOT, 'Free some space'),
    (errno.EFBIG, 'ulimit -f'),
    (errno.EROFS, 'Make its folder writable'),
    (errno.EACCES, 'Make its folder writable'),
    (errno.ENOENT, 'Put it back'),
    (errno.ESTALE, 'Put it back'),
    (errno.EIO, 'Check the disk'),
    (errno.EMFILE, 'ulimit -n'),
  ],
)
@pytest.mark.parametrize('library', [False, True])
def test_a_fault_names_the_path_the_reason_and_the_way_out(number, advice, library):
  """Libraries in C++ raise exceptions of their own that quote the operating system."""
  error = OSError(number, os.strerror(number))
  error = ValueError(f'INTERNAL: write failed: {os.strerror(number)} [1]') if library else error
  with pytest.raises(StoppedError) as raised, writing('/runs/one/file'):
    raise error
  message = str(raised.value)
  assert '/runs/one/file' in message and advice in message and os.strerror(number) in message
  assert 'start the same command again' in message and '\n' not in message


def test_the_cause_of_a_fault_is_found_in_a_group_of_a_chain():
  try:
    try:
      raise OSError(errno.ENOSPC, 'No space left on device', '/deep/file')
    except OSError as error:
      raise ExceptionGroup('saving failed', [ValueError('lost'), error]) from None
  except ExceptionGroup as group:
    chained = RuntimeError('background thread')
    chained.__cause__ = group
  assert describe_fault(chained).startswith('/deep/file cannot be used: No space left')
  assert describe_fault(ValueError('a bug'), '/some/file') == ''


def test_a_bug_in_a_write_keeps_its_type(tmp_path):
  with pytest.raises(TypeError, match='not JSON serializable'):
    write_json(tmp_path / 'a.json', {'a': object()})
  assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path):
  path = tmp_path / 'a.json'
  write_json(path, {'a': 1})
  before = path.read_bytes()
  with pytest.raises(StoppedError), replacing(path) as temporary:
    temporary.write_text('half')
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('write', [
  lambda folder: write_json(folder / 'a.json', {}),
  lambda folder: d_cai.write_shard(folder, 0, []),
  lambda folder: make_folder(folder / 'deep'),
  lambda folder: Journal(folder / 'journal'),
  lambda folder: EventWriter(folder / 'tensorboard', 1),
])  # fmt: skip
def test_a_file_in_place_of_the_folder_is_reported(tmp_path, write):
  (tmp_path / 'folder').write_text('')
  with pytest.raises(StoppedError, match=r'folder.* cannot be used: Not a directory.*Put it back'):
    write(tmp_path / 'folder')


def test_a_deleted_folder_is_reported_and_not_created_again(tmp_path):
  with pytest.raises(StoppedError, match='00000 cannot be used: No such file.*Put it back'):
    d_cai.write_shard(tmp_path / 'gone', 0, [])
  assert not list(tmp_path.iterdir())


def test_a_deleted_journal_is_reported(tmp_path):
  """Turns that are written to a deleted file would be lost without a word."""
  journal = Journal(tmp_path)
  (tmp_path / 'turns-00000.jsonl').unlink()
  with pytest.raises(StoppedError, match='turns-00000.jsonl cannot be used: No such file'):
    journal.put([])


def test_a_fault_of_the_machine_anywhere_ends_the_program_in_one_line(tmp_path):
  with pytest.raises(SystemExit) as ended, cli.short_errors():
    open(tmp_path / 'gone' / 'file')
  assert str(ended.value).startswith(f'error: {tmp_path}/gone/file cannot be used: No such file')
