"""A folder and its store stay equal, and the store is whole at every moment."""

import os
import shutil
import time

import pytest

from cai_jax.runtime.cloud import objects
from cai_jax.runtime.cloud.index import INDEX, claim_order, is_claim, scan, unfinished
from cai_jax.runtime.cloud.mirror import Mirror
from cai_jax.runtime.cloud.store import Store
from cai_jax.runtime.errors import StoppedError, UserError
from tests.mirror_setup import FILES, append, files, make_store, read, start, write


@pytest.fixture
def store(monkeypatch):
  return make_store(monkeypatch)


def test_a_new_machine_gets_every_file_and_its_time(store, tmp_path):
  one, two = tmp_path / 'one', tmp_path / 'two'
  mirror = start(store, one)
  write(one, FILES)
  os.utime(one / 'manifest.json', ns=(10**18, 10**18 + 123456789))
  assert mirror.push() and not mirror.push()
  assert files(store) == FILES.keys()
  Mirror(store, two, 'other').pull()
  assert read(two) == FILES
  for name in FILES:
    assert (one / name).stat().st_mtime_ns == (two / name).stat().st_mtime_ns


def test_only_what_changed_is_moved(store, tmp_path):
  mirror = start(store, tmp_path)
  write(tmp_path, FILES)
  mirror.push()
  store.fs.calls.clear()
  write(tmp_path, {'d_cai/d_cai-train.array_record-00001': b'more'})
  mirror.push()
  assert store.fs.calls == ['write d_cai/d_cai-train.array_record-00001', f'write {INDEX}']
  fetched = []
  store.fs.get_file = lambda name, target, **_: fetched.append(name)
  assert Mirror(store, tmp_path, 'next').pull() == 0 and fetched == []


def test_hidden_and_unfinished_files_stay_here(store, tmp_path):
  mirror = start(store, tmp_path)
  write(
    tmp_path,
    {
      '.lock/000001': b'x',
      'd_cai/.d_cai-train.array_record-00000.tmp': b'x',
      'checkpoints/4.orbax-checkpoint-tmp-17/state': b'x',
      'metrics.jsonl': b'{}\n',
    },
  )
  (tmp_path / 'link').symlink_to(tmp_path / 'metrics.jsonl')
  mirror.push()
  assert files(store) == {'metrics.jsonl'}


def test_claims_are_written_last_and_deleted_first(store, tmp_path):
  mirror = start(store, tmp_path)
  write(tmp_path, FILES)
  store.fs.calls.clear()
  mirror.push()
  written = [call.removeprefix('write ') for call in store.fs.calls]
  claims = [name for name in written if is_claim(name)]
  assert written[-len(claims) :] == claims and len(claims) == 4
  assert claims == [
    'd_cai/dataset_info.json',
    'checkpoints/2/_CHECKPOINT_METADATA',
    'manifest.json',
    INDEX,
  ]
  assert claims[:3] == sorted(claims[:3], key=claim_order)
  store.fs.calls.clear()
  shutil.rmtree(tmp_path / 'checkpoints')
  (tmp_path / 'd_cai' / 'dataset_info.json').unlink()
  mirror.push()
  deleted = [call for call in store.fs.calls if call.startswith('delete')]
  assert deleted == [
    'delete checkpoints/2/_CHECKPOINT_METADATA',
    'delete d_cai/dataset_info.json',
    'delete checkpoints/2/commit_success.txt',
    'delete checkpoints/2/state/d/0',
  ]


def test_a_checkpoint_that_is_being_deleted_is_no_checkpoint(store, tmp_path):
  """Its other files go first, here, and the store must not keep one that is half there."""
  mirror = start(store, tmp_path)
  write(tmp_path, FILES)
  mirror.push()
  (tmp_path / 'checkpoints/2/state/d/0').unlink()
  mirror.push()
  left = {name for name in files(store) if name.startswith('checkpoints/')}
  assert unfinished(files(store)) == left


def test_what_a_claim_describes_is_in_the_store_before_it(store, tmp_path, monkeypatch):
  """The run writes a shard, and the manifest that claims it, while a push goes on."""
  mirror = start(store, tmp_path)
  write(tmp_path, {'manifest.json': b'{"shards": 0}', 'rows-0': b'x'})
  upload = Store.upload

  def run_goes_on(self, name, source):
    write(tmp_path, {'rows-1': b'y', 'manifest.json': b'{"shards": 1}'})
    return upload(self, name, source)

  monkeypatch.setattr(Store, 'upload', run_goes_on)
  mirror.push()
  assert store.read('manifest.json') == b'{"shards": 0}' and files(store) == {
    'manifest.json',
    'rows-0',
  }
  monkeypatch.undo()
  mirror.push()
  assert store.read('manifest.json') == b'{"shards": 1}' and 'rows-1' in files(store)


def test_what_changes_during_a_push_waits_for_the_next(store, tmp_path, monkeypatch):
  """So a shard is never in the store without its costs, which are written before it."""
  monkeypatch.undo()  # the clock of the disk
  mirror = start(store, tmp_path)
  write(tmp_path, {'a': b'1'})
  time.sleep(0.05)
  later = scan(tmp_path)['a'].st_mtime_ns + 10**12
  write(tmp_path, {'b': b'1', 'c.json': b'{}'})
  for name in ('b', 'c.json'):
    os.utime(tmp_path / name, ns=(later, later))
  mirror.push()
  assert files(store) == {'a'}
  mirror.push(still=True)
  assert files(store) == {'a', 'b', 'c.json'}


def test_records_are_written_first(store, tmp_path):
  mirror = start(store, tmp_path)
  write(tmp_path, FILES | {'costs/generate-00000.json': b'{}'})
  store.fs.calls.clear()
  mirror.push()
  records = ['write costs/generate-00000.json', 'write journal/turns-00000.jsonl']
  assert sorted(store.fs.calls[:2]) == records


@pytest.mark.parametrize('changes', range(12))
def test_a_kill_at_any_moment_leaves_a_whole_store(store, tmp_path, changes):
  """A push dies after so many changes; a new machine then finds no claim without its files."""
  mirror = start(store, tmp_path / 'one')
  write(tmp_path / 'one', FILES)
  store.fs.left = changes
  try:
    mirror.push()
  except ConnectionError:
    assert changes < 9  # eight files and the index
  store.fs.left = 10**9
  Mirror(store, tmp_path / 'two', 'other').pull()
  there = read(tmp_path / 'two')
  assert there.items() <= FILES.items()
  if 'manifest.json' in there:
    assert there == FILES
  if 'd_cai/dataset_info.json' in there:
    assert 'd_cai/d_cai-train.array_record-00000' in there
  step = {name for name in there if name.startswith('checkpoints/')}
  assert len(step) in (0, 3) and unfinished({*there}) == set()
  assert unfinished(files(store)) == set()  # what was left of a checkpoint is deleted


def test_work_that_was_not_written_is_kept_and_written(store, tmp_path):
  mirror = start(store, tmp_path)
  write(tmp_path, {'a': b'1', 'b': b'1'})
  mirror.push()
  write(tmp_path, {'a': b'2', 'c': b'1'})  # and then the process is killed
  start(store, tmp_path)
  assert read(tmp_path) == {'a': b'2', 'b': b'1', 'c': b'1'}
  assert {name: store.read(name) for name in files(store)} == read(tmp_path)


def test_what_another_machine_wrote_since_replaces_the_last_seconds(store, tmp_path):
  one, two = tmp_path / 'one', tmp_path / 'two'
  mirror = start(store, one)
  write(one, {'a': b'1', 'gone': b'1'})
  mirror.push()
  write(one, {'a': b'lost', 'new': b'lost'})
  other = start(store, two)
  write(two, {'a': b'2'})
  (two / 'gone').unlink()
  other.push()
  start(store, one)
  assert read(one) == read(two) == {'a': b'2'}


def test_work_of_a_time_without_store_is_not_thrown_away(store, tmp_path):
  one, two = tmp_path / 'one', tmp_path / 'two'
  mirror = start(store, one)
  write(one, {'a': b'hours of work'})
  mirror.mark_unwritten()
  start(store, two)
  with pytest.raises(UserError, match=r'1 files that could not be written.*Delete the folder'):
    start(store, one)
  assert read(one) == {'a': b'hours of work'}


def test_files_that_a_user_deletes_or_adds_in_the_store_count(store, tmp_path):
  mirror = start(store, tmp_path)
  write(tmp_path, {'a': b'1', 'b': b'1'})
  mirror.push()
  store.delete('a')
  store.write('journal/turns-00000.jsonl', b'from another run\n')
  start(store, tmp_path)
  assert read(tmp_path) == {'b': b'1', 'journal/turns-00000.jsonl': b'from another run\n'}


@pytest.mark.parametrize('changes', range(4))
def test_a_kill_while_files_are_fetched_changes_nothing(store, tmp_path, changes):
  one, two = tmp_path / 'one', tmp_path / 'two'
  mirror = start(store, one)
  write(one, FILES)
  mirror.push()
  fetch = store.fs.get_file
  left = iter(range(changes))

  def die(name, target, **_):
    if next(left, None) is None:
      raise ConnectionError
    fetch(name, target)

  store.fs.get_file = die
  with pytest.raises(ConnectionError):
    start(store, two)
  store.fs.get_file = fetch
  start(store, two)
  assert read(two) == FILES and files(store) == FILES.keys()


def test_stale_work_stays_stale_after_a_fetch_that_was_cut_short(store, tmp_path):
  one, two = tmp_path / 'one', tmp_path / 'two'
  mirror = start(store, one)
  write(one, FILES)
  mirror.push()
  write(one, {'manifest.json': b'stale'})  # and then the machine is away
  append(one / 'journal/turns-00000.jsonl', b'stale\n')
  other = start(store, two)
  write(two, {'manifest.json': b'newer'})
  append(two / 'journal/turns-00000.jsonl', b'three\n')
  other.push()
  fetch, store.fs.get_file = store.fs.get_file, None
  with pytest.raises(TypeError):
    start(store, one)
  store.fs.get_file = fetch
  start(store, one)
  start(store, tmp_path / 'three')
  assert read(one) == read(two) == read(tmp_path / 'three')


def test_a_url_above_a_run_is_refused_and_harms_nothing(store, tmp_path):
  inner = Store('s3://bucket/run/one', store.fs, '/bucket/run/one')
  mirror = start(inner, tmp_path / 'one')
  write(tmp_path / 'one', {'turns.jsonl': b'x' * 99 + b'\n'})
  mirror.push()
  append(tmp_path / 'one/turns.jsonl', b'y\n')
  mirror.push()
  before = {name: inner.read(name) for name in inner.list()}
  assert len(before) == 3  # the file, its part and the index
  with pytest.raises(UserError, match='s3://bucket/run contains the workdir s3://bucket/run/one'):
    start(store, tmp_path / 'two')
  assert {name: inner.read(name) for name in inner.list()} == before


def test_hidden_files_in_the_store_are_left_alone(store, tmp_path):
  store.write('notes/.mine', b'x')
  mirror = start(store, tmp_path)
  write(tmp_path, {'notes/a': b'x'})
  mirror.push()
  assert read(tmp_path) == {'notes/a': b'x'} and store.read('notes/.mine') == b'x'


def test_a_claim_that_is_replaced_after_the_look_waits(store, tmp_path, monkeypatch):
  mirror = start(store, tmp_path)
  write(tmp_path, {'manifest.json': b'{"shards": 0}'})
  mirror_scan = objects.scan

  def scan_early(folder):
    found = mirror_scan(folder)
    write(tmp_path, {'manifest.json': b'{"shards": 1}'})
    return found

  monkeypatch.setattr(objects, 'scan', scan_early)
  mirror.push()
  assert files(store) == set()
  monkeypatch.setattr(objects, 'scan', mirror_scan)
  mirror.push()
  assert store.read('manifest.json') == b'{"shards": 1}'


def test_a_checkpoint_that_appears_during_a_push_waits_as_a_whole(store, tmp_path, monkeypatch):
  mirror, step = start(store, tmp_path), 'checkpoints/2'
  read_claims = Mirror._read_claims

  def appear_late(self, moment):
    claims = read_claims(self, moment)
    write(tmp_path, {name: FILES[name] for name in FILES if name.startswith(step)})
    return claims

  monkeypatch.setattr(Mirror, '_read_claims', appear_late)
  mirror.push()
  monkeypatch.undo()
  assert files(store) == set()
  start(store, tmp_path)  # after a kill
  assert read(tmp_path).keys() == files(store) == {n for n in FILES if n.startswith(step)}


def test_a_folder_that_was_deleted_deletes_nothing_in_the_store(store, tmp_path):
  mirror = start(store, tmp_path / 'run')
  write(tmp_path / 'run', FILES)
  mirror.push()
  shutil.rmtree(tmp_path / 'run')
  with pytest.raises(StoppedError, match='was deleted while a run used it'):
    mirror.push()
  assert files(store) == FILES.keys()


def test_a_damaged_index_is_named(store, tmp_path):
  start(store, tmp_path / 'one')
  store.write(INDEX, b'{"files": 1}')
  with pytest.raises(UserError, match=rf'run/{INDEX} is damaged.*Delete it'):
    start(store, tmp_path / 'two')


def test_a_file_that_disappears_during_a_push_is_no_error(store, tmp_path, monkeypatch):
  mirror = start(store, tmp_path)
  write(tmp_path, {'metrics.jsonl': b'1\n', 'a': b'1'})
  mirror.push()
  append(tmp_path / 'metrics.jsonl', b'2\n')
  scanned = scan(tmp_path)
  (tmp_path / 'metrics.jsonl').unlink()
  monkeypatch.setattr(objects, 'scan', lambda folder: scanned)
  assert not mirror.push()
