"""Mirrors of the processes of one run: each has a folder, and sees the files of the others."""

import os
import types

import pytest

from cai_jax.runtime.cloud import direct
from cai_jax.runtime.cloud import keeper as keepers
from cai_jax.runtime.cloud.direct import is_checkpoint
from cai_jax.runtime.cloud.index import INDEX
from cai_jax.runtime.cloud.keeper import Keeper
from cai_jax.runtime.cloud.mirror import UNWRITTEN, Mirror
from cai_jax.runtime.cloud.store import Store
from cai_jax.runtime.errors import StoppedError, UserError
from tests.mirror_setup import FILES, append, make_store, read, start, write

JOURNAL = 'journal/turns-00001.jsonl'
OTHERS = types.SimpleNamespace(send=lambda: False, receive=lambda: None)
OWN = {name: content for name, content in FILES.items() if not is_checkpoint(name)}


@pytest.fixture
def store(monkeypatch):
  return make_store(monkeypatch)


def join(store, folder, count=2):
  """The mirrors of processes, after their first pull."""
  mirrors = [
    Mirror(store, folder / str(i), 'job', alone=False, leads=i == 0, leave_out=is_checkpoint)
    for i in range(count)
  ]
  for mirror in mirrors:
    mirror.pull()
  return mirrors


def exchange(mirrors):
  """What happens where processes wait for each other."""
  for mirror in mirrors:
    mirror.push(still=True)
  return [mirror.refresh() for mirror in mirrors]


def contents(mirrors):
  return [read(mirror.folder) for mirror in mirrors]


def test_each_process_sees_what_the_others_wrote_changed_and_deleted(store, tmp_path):
  one, two = mirrors = join(store, tmp_path)
  write(one.folder, {'manifest.json': b'{}', 'shards/0': b'a'})
  write(two.folder, {'shards/1': b'b', 'journal/turns-00001.jsonl': b'one\n'})
  assert exchange(mirrors) == [2, 2]
  there = {'manifest.json', 'shards/0', 'shards/1', 'journal/turns-00001.jsonl'}
  assert [folder.keys() for folder in contents(mirrors)] == [there, there]
  assert exchange(mirrors) == [0, 0]
  write(one.folder, {'manifest.json': b'{"done": 1}'})
  (one.folder / 'shards/1').unlink()  # a file of the other process
  append(two.folder / 'journal/turns-00001.jsonl', b'two\n')
  assert exchange(mirrors) == [1, 1]
  for folder in contents(mirrors):
    assert folder.keys() == there - {'shards/1'}
    assert folder['manifest.json'] == b'{"done": 1}'
    assert folder['journal/turns-00001.jsonl'] == b'one\ntwo\n'
  store.fs.calls.clear()
  assert exchange(mirrors) == [0, 0] and not store.fs.calls


def test_a_new_start_gives_every_process_the_same_files(store, tmp_path):
  write(tmp_path / 'first', FILES)
  start(store, tmp_path / 'first').push()
  mirrors = join(store, tmp_path, count=3)
  assert contents(mirrors) == [OWN] * 3  # Orbax reads checkpoints from the store
  times = {os.stat(mirror.folder / 'manifest.json').st_mtime_ns for mirror in mirrors}
  assert len(times) == 1
  write(mirrors[1].folder, {'unfinished': b'x'})  # in the last second of a process
  append(mirrors[1].folder / 'journal/turns-00000.jsonl', b'x')
  write(mirrors[0].folder, {'unfinished too': b'x'})
  assert contents(join(store, tmp_path, count=3)) == [OWN] * 3
  assert store.list().keys() >= FILES.keys()


def test_only_one_process_writes_the_index(store, tmp_path):
  one, two = join(store, tmp_path)
  before = store.read(INDEX)
  write(two.folder, {'shards/1': b'b'})
  assert two.push() and store.read(INDEX) == before
  write(one.folder, {'shards/0': b'a'})
  assert one.push() and store.read(INDEX) != before


def grow(mirrors):
  """Let the second process write a line, and then another one that the first has not fetched."""
  one, two = mirrors
  write(two.folder, {JOURNAL: b'one\n', 'shards/1': b'b'})
  exchange(mirrors)
  append(two.folder / JOURNAL, b'two\n')
  write(two.folder, {'shards/3': b'd'})
  two.push(still=True)


def grow_by_a_part(mirrors):
  """Let the second process write a file, and then a line that the store gets as a part."""
  two = mirrors[1]
  write(two.folder, {JOURNAL: b'x' * 5000 + b'\n'})
  exchange(mirrors)
  append(two.folder / JOURNAL, b'two\n')
  two.push(still=True)


def fail(*_, **__):
  raise ConnectionError('the store is away')


def test_a_process_that_could_not_fetch_all_overwrites_nothing(store, tmp_path, monkeypatch):
  """What it has is older than what the others wrote, and half of it may be new."""
  one, two = mirrors = join(store, tmp_path)
  grow(mirrors)
  monkeypatch.setattr(keepers.time, 'sleep', lambda seconds: None)
  monkeypatch.setattr(store.fs, 'get_file', fail)  # the journal comes in parts, and arrives
  keeper = Keeper(one, store.url, alone=False)
  with pytest.raises(StoppedError, match='the store is away.*start the same command again'):
    keeper.receive()
  monkeypatch.undo()
  there = {name: store.read(name) for name in store.list() if name != INDEX}
  keeper.close(join=False, in_time=False)
  assert {name: store.read(name) for name in store.list() if name != INDEX} == there
  # The next start may have one process, in the folder of this one.
  append(two.folder / JOURNAL, b'three\n')
  two.push(still=True)
  one = start(store, tmp_path / '0', 'other')
  assert read(one.folder)[JOURNAL] == b'one\ntwo\nthree\n' and (one.folder / 'shards/3').exists()


def test_a_kill_while_files_are_fetched_leaves_no_work_of_its_own(store, tmp_path, monkeypatch):
  one, two = mirrors = join(store, tmp_path)
  grow(mirrors)
  monkeypatch.setattr(Mirror, '_write_local', lambda *_: fail())  # what a kill leaves out
  with pytest.raises(ConnectionError):
    one.refresh()
  monkeypatch.undo()
  fetch = Mirror._fetch_all
  monkeypatch.setattr(Mirror, '_fetch_all', lambda *x: (fetch(*x), fail()))
  with pytest.raises(ConnectionError):
    one.refresh()
  monkeypatch.undo()
  append(two.folder / JOURNAL, b'three\n')
  two.push(still=True)
  assert read(start(store, tmp_path / '0').folder)[JOURNAL] == b'one\ntwo\nthree\n'


def test_another_launch_may_write_while_files_are_fetched(store, tmp_path, monkeypatch):
  """It merges parts between the listing and the reads."""
  one, two = mirrors = join(store, tmp_path)
  grow_by_a_part(mirrors)
  list_objects, rounds = Mirror._list, []

  def list_late(self):
    listed = list_objects(self)
    if len(rounds) < 3:
      rounds.append(1)
      append(two.folder / JOURNAL, b'more and more\n' * 4 ** len(rounds))
      two.push(still=True)
    return listed

  monkeypatch.setattr(Mirror, '_list', list_late)
  one.refresh()
  assert read(one.folder)[JOURNAL] == read(two.folder)[JOURNAL]


def test_only_what_a_file_has_grown_by_is_fetched(store, tmp_path, monkeypatch):
  one, two = mirrors = join(store, tmp_path)
  grow_by_a_part(mirrors)
  monkeypatch.setattr(store.fs, 'get_file', fail)
  one.refresh()
  assert read(one.folder) == read(two.folder)


def test_what_a_thread_sends_meanwhile_counts_as_sent(store, tmp_path, monkeypatch):
  one, _ = join(store, tmp_path)
  keeper = Keeper(one, store.url, alone=False)
  write(one.folder, {'shards/0': b'a'})
  push = one.push

  def push_twice(*arguments):
    push(still=True)  # the thread is just ahead of the caller
    return push(*arguments)

  monkeypatch.setattr(one, 'push', push_twice)
  assert keeper.send() and not keeper.send()
  keeper.close(join=False)


def test_several_processes_leave_no_checkpoints_for_one_that_follows(store, tmp_path):
  """It would take stale ones for work of its own."""
  mirror = start(store, tmp_path / '0', 'job')
  write(mirror.folder, FILES)
  mirror.push(still=True)
  one, _ = join(store, tmp_path)
  assert not any(map(is_checkpoint, read(one.folder)))
  for name in [name for name in store.list() if is_checkpoint(name)]:
    store.delete(name)  # Orbax keeps the latest ones
  assert read(start(store, tmp_path / '0').folder) == OWN


def test_checkpoints_of_one_process_without_store_are_not_thrown_away(store, tmp_path):
  mirror = start(store, tmp_path / '0', 'job')
  write(mirror.folder, {name: x for name, x in FILES.items() if is_checkpoint(name)})
  mirror.mark_unwritten()
  with pytest.raises(UserError, match='Only a run of one process could use them'):
    join(store, tmp_path)


def test_processes_wait_for_a_store_that_is_away_before_they_give_up(store, tmp_path, monkeypatch):
  waits = []
  monkeypatch.setattr(keepers.time, 'sleep', waits.append)
  one, _ = join(store, tmp_path)
  keeper = Keeper(one, store.url, alone=False)
  write(one.folder, {'shards/0': b'a'})
  assert keeper.send() and not keeper.send()
  write(one.folder, {'shards/2': b'a'})
  store.fs.away = True
  with pytest.raises(StoppedError, match='other processes need the files of this one'):
    keeper.send()
  assert tuple(waits) == keepers.EXCHANGE_WAITS_SECONDS
  assert not (one.folder / UNWRITTEN).exists()  # the next start takes what the store has
  store.fs.away = False
  keeper.close(join=True)


def test_work_of_one_process_without_store_is_not_thrown_away(store, tmp_path):
  mirror = start(store, tmp_path / '0', 'job')
  write(mirror.folder, {'shards/0': b'a'})
  mirror.mark_unwritten()
  with pytest.raises(UserError, match='Only a run of one process could use them'):
    join(store, tmp_path)
  assert read(mirror.folder) == {'shards/0': b'a'}


def test_checkpoints_of_several_processes_are_in_the_store(tmp_path):
  folder = tmp_path / 'run' / 'prefer' / 'policy' / 'checkpoints'
  here, there = Store('s3://bucket/run', None, ''), Store('gs://bucket/run', None, '')
  assert direct.place(folder) == folder
  with direct.working_in(tmp_path / 'run', there, None):  # one process
    assert direct.place(folder) == folder
    direct.check_training(tmp_path / 'run')
  with direct.working_in(tmp_path / 'run', there, OTHERS):
    assert str(direct.place(folder)) == 'gs://bucket/run/prefer/policy/checkpoints'
    assert direct.place(tmp_path / 'other' / 'checkpoints') == tmp_path / 'other' / 'checkpoints'
    direct.check_training(tmp_path / 'run')
  with direct.working_in(tmp_path / 'run', here, OTHERS):
    with pytest.raises(UserError, match='checkpoints to gs:// only'):
      direct.check_training(tmp_path / 'run')


def test_gcs_is_another_name_of_gs(tmp_path):
  with direct.working_in(tmp_path, Store('gcs://bucket/run', None, ''), OTHERS):
    assert str(direct.place(tmp_path / 'checkpoints')) == 'gs://bucket/run/checkpoints'


def test_a_store_that_is_away_is_no_damaged_checkpoint():
  with pytest.raises(StoppedError, match='cannot be reached'):
    direct.check_reached('gs://bucket/run/checkpoints', ValueError('UNAVAILABLE: 503'))
  for error in (FileNotFoundError('gone'), ValueError('DATA_LOSS: checksum'), KeyError('x')):
    direct.check_reached('gs://bucket/run/checkpoints', error)
  direct.check_reached('/local', ConnectionError('a bug'))


def test_a_store_that_refuses_a_checkpoint_ends_the_run_in_order():
  with pytest.raises(StoppedError, match='gs://bucket/run cannot be used: permission denied'):
    with direct.asking('gs://bucket/run'):
      raise ValueError('PERMISSION_DENIED: 403 Forbidden')
  with pytest.raises(ValueError, match='a bug'), direct.asking('/local/folder'):
    raise ValueError('a bug')
