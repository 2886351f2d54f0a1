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


def test_a_process_that_could_not_fetch_all_writes_nothing_more(store, tmp_path, monkeypatch):
  """Its older files would replace those of the others."""
  one, two = mirrors = join(store, tmp_path)
  write(two.folder, {'journal/turns-00001.jsonl': b'one\n'})
  exchange(mirrors)
  append(two.folder / 'journal/turns-00001.jsonl', b'two\n')
  two.push(still=True)

  def fail(*_, **__):
    raise ConnectionError('the store is away')

  monkeypatch.setattr(store.fs, 'get_file', fail)
  keeper = Keeper(one, store.url, alone=False)
  with pytest.raises(StoppedError, match='the store is away.*start the same command again'):
    keeper.receive()
  monkeypatch.undo()
  store.fs.calls.clear()
  keeper.close(join=False, in_time=False)
  assert not store.fs.calls
  assert contents(join(store, tmp_path))[0]['journal/turns-00001.jsonl'] == b'one\ntwo\n'


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
  assert tuple(waits) == keepers.SEND_WAITS_SECONDS
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


def test_a_store_that_refuses_a_checkpoint_ends_the_run_in_order():
  with pytest.raises(StoppedError, match='gs://bucket/run cannot be used: permission denied'):
    with direct.asking('gs://bucket/run'):
      raise ValueError('PERMISSION_DENIED: 403 Forbidden')
  with pytest.raises(ValueError, match='a bug'), direct.asking('/local/folder'):
    raise ValueError('a bug')
