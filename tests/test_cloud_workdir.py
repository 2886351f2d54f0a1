"""A run's folder behind a URL: one job at a time, nothing lost, and messages that name the URL."""

import concurrent.futures
import contextlib
import datetime
import json
import os
import pathlib
import threading
import time
import uuid

import pytest

from cai_jax import pipeline
from cai_jax.pipeline import import_results, launches, rate
from cai_jax.publishing import command as publishing
from cai_jax.runtime import lock
from cai_jax.runtime.cloud import direct, lease, store, workdir
from cai_jax.runtime.cloud.mirror import Mirror
from cai_jax.runtime.cloud.workdir import open_part, resolve_workdir, scratch_folder
from cai_jax.runtime.errors import StoppedError, UserError
from cai_jax.runtime.interruption import Interrupted
from configs import tiny
from tests.test_import_results import LM_EVAL


@pytest.fixture
def url(tmp_path, monkeypatch):
  monkeypatch.setenv(workdir.SCRATCH, str(tmp_path / 'scratch'))
  return f'memory://bucket/{uuid.uuid4().hex}'


@pytest.fixture
def place(url):
  return store.open_store(url)


def names(place):
  return {name for name in place.list() if not name.startswith('.cai_jax/')}


def write_lock(place, age, **fields):
  """Write the lock of another job that was last active some seconds ago."""
  facts = {'job': 'abc', 'since': 'noon'} | lock.describe_process() | fields
  place.write(f'{lease.LEASE}/000007', json.dumps(facts).encode())
  file = place.fs.store[place.path(f'{lease.LEASE}/000007')]
  file.modified -= datetime.timedelta(seconds=age)


def test_a_held_store_is_refused_and_free_afterwards(place):
  with lease.hold(place) as held:
    assert len(held.job) == 12
    message = rf'{place.url} belongs to job {held.job} \(process {os.getpid()} on \S+, since 20'
    with pytest.raises(UserError, match=message), lease.hold(place):
      pass
  with pytest.raises(KeyError), lease.hold(place):
    raise KeyError
  with lease.hold(place):
    assert [*place.list(lease.LEASE)] == [f'{lease.LEASE}/000003']
  assert [*place.list(lease.LEASE)] == [f'{lease.LEASE}/000003.free']


def test_a_job_that_was_killed_here_is_followed_at_once(place):
  write_lock(place, 1, process_start='another')
  with lease.hold(place):
    assert [*place.list(lease.LEASE)] == [f'{lease.LEASE}/000008']


def test_a_job_elsewhere_is_followed_after_a_minute(place):
  write_lock(place, 30, host='elsewhere')
  with pytest.raises(UserError, match=r'job abc .* on elsewhere.*start again in 3\d s'):
    with lease.hold(place):
      pass
  write_lock(place, 61, host='elsewhere')
  with lease.hold(place):
    pass


def test_of_many_jobs_one_gets_the_store(place):
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    starts = [pool.submit(lease._acquire, place, b'{}') for _ in range(8)]
  errors = [start.exception() for start in starts]
  assert sum(error is None for error in errors) == 1
  assert all(error is None or isinstance(error, UserError) for error in errors)


def test_a_holder_shows_that_it_is_active_and_ends_when_it_was_replaced(place, monkeypatch):
  monkeypatch.setattr(lock, 'HEARTBEAT_SECONDS', 0.01)
  reasons, ended = [], threading.Event()

  def end(reason):
    reasons.append(reason)
    ended.set()

  with lease.hold(place, end):
    first = place.modified(f'{lease.LEASE}/000001')
    time.sleep(0.1)
    assert place.modified(f'{lease.LEASE}/000001') > first
    place.write(f'{lease.LEASE}/000002', json.dumps({'job': 'def'}).encode())
    assert ended.wait(10)
  assert 'was taken over by job def' in reasons[0]


@pytest.mark.parametrize('moment', ['before', 'during'])
def test_a_job_that_was_replaced_writes_nothing(place, tmp_path, monkeypatch, moment):
  """Another job takes the store over before a push, or while its first file is written."""
  upload, others = store.Store.upload, contextlib.ExitStack()

  def take_over(self=place, name='', source=None):
    monkeypatch.setattr(store.Store, 'upload', upload)
    place.fs.store[place.path(f'{lease.LEASE}/000001')].modified -= datetime.timedelta(seconds=61)
    second = others.enter_context(lease.hold(place))
    two = Mirror(place, tmp_path / 'two', second.job, second.check)
    two.pull()
    (tmp_path / 'two' / 'manifest.json').write_bytes(b'second')
    two.push(still=True)
    before.update(place.list())
    return upload(self, name, source) if source else None

  with others, lease.hold(place) as first:
    one, before = Mirror(place, tmp_path / 'one', first.job, first.check), {}
    (tmp_path / 'one').mkdir()
    (tmp_path / 'one' / 'gone').write_bytes(b'x')
    one.pull()
    (tmp_path / 'one' / 'gone').unlink()
    for name in ('a', 'manifest.json'):
      (tmp_path / 'one' / name).write_bytes(b'first')
    if moment == 'before':
      take_over()
    else:
      monkeypatch.setattr(store.Store, 'upload', take_over)
    for push in (one.push, one.push):
      with pytest.raises(StoppedError, match='was taken over by job .*writes nothing more'):
        push(still=True)
    after = place.list()
    if moment == 'during':  # the file that was being written, which the second job does not know
      assert after.pop('a')
    assert after == before and place.read('manifest.json') == b'second'


def test_a_path_is_taken_as_it_is(tmp_path):
  place = resolve_workdir(str(tmp_path / 'new'))
  with place.open() as stage_ended:
    stage_ended()
  with place.look() as folder:
    assert str(folder) == place.folder == place.show(place.folder) == str(tmp_path / 'new')
  assert not folder.exists()


def test_a_url_has_a_folder_of_its_own(url, tmp_path):
  folder = scratch_folder('s3://bucket/a/run')
  assert folder.parent.parent == tmp_path / 'scratch' and folder.name == 'run'
  assert folder != scratch_folder('s3://bucket/b/run')
  assert scratch_folder('s3://bucket/a b/..').name == 'run'
  assert resolve_workdir(f'{url}/').folder == resolve_workdir(url).folder


def test_a_run_with_a_url_is_in_the_store_after_each_stage_and_at_the_end(url, place, tmp_path):
  run = resolve_workdir(url)
  with run.open() as stage_ended:
    (tmp_path.joinpath(run.folder) / 'one').write_bytes(b'1')
    stage_ended()
    assert names(place) == {'one'}
    (tmp_path.joinpath(run.folder) / 'two').write_bytes(b'2')
  assert names(place) == {'one', 'two'}
  assert run.show(f'report: {run.folder}/report.html') == f'report: {url}/report.html'


@pytest.mark.parametrize('error', [UserError('in FOLDER/x'), Interrupted(15), RuntimeError('bug')])
def test_what_was_written_before_an_error_is_in_the_store(url, place, tmp_path, error):
  run = resolve_workdir(url)
  if isinstance(error, UserError):
    error = UserError(f'in {run.folder}/x')
  with pytest.raises(type(error)) as raised, run.open():
    (tmp_path.joinpath(run.folder) / 'one').write_bytes(b'1')
    raise error
  assert names(place) == {'one'} and raised.value is error
  assert not isinstance(error, UserError) or str(error) == f'in {url}/x'


def test_an_error_is_not_hidden_by_a_store_that_is_away(url, capsys, monkeypatch, tmp_path):
  run = resolve_workdir(url)
  monkeypatch.setattr('cai_jax.runtime.cloud.keeper.LAST_WAITS_SECONDS', (0.01,))

  def fail(*_, **__):
    raise ConnectionError('no route')

  with pytest.raises(KeyError), run.open():
    (tmp_path.joinpath(run.folder) / 'one').write_bytes(b'1')
    monkeypatch.setattr(Mirror, 'push', fail)
    raise KeyError
  assert f'are in {run.folder}' in capsys.readouterr().err


def test_looking_writes_nothing(url, place):
  place.write('manifest.json', b'{}')
  before = place.list()
  run = resolve_workdir(url)
  with run.look() as folder:
    assert (folder / 'manifest.json').read_bytes() == b'{}'
    (folder / 'x').write_bytes(b'x')
  assert place.list() == before and not folder.exists() and not os.path.exists(run.folder)


def test_a_part_is_fetched_and_written_back(url, place):
  place.write('evaluation/summary.json', b'{}')
  place.write('model/model.safetensors', b'large')
  with open_part(url, 'evaluation') as part:
    folder = pathlib.Path(part.folder)
    assert [path.name for path in folder.iterdir()] == ['evaluation']
    (folder / 'evaluation' / 'ratings.json').write_bytes(b'{}')
    kept = place.entry('evaluation/summary.json')
  assert names(place) == {
    'evaluation/summary.json',
    'evaluation/ratings.json',
    'model/model.safetensors',
  }
  assert place.entry('evaluation/summary.json') == kept


@pytest.mark.parametrize(
  'command',
  [
    lambda url: rate.run_command('rate', ['export', url, '--out=sheet']),
    lambda url: import_results.run_command('import', [url, 'results.json', '--model=base']),
  ],
)
def test_commands_name_the_url(url, command):
  with pytest.raises(UserError, match=rf'^{url} has no '):
    command(url)


def test_imported_numbers_go_to_the_store(url, place, tmp_path, capsys):
  place.write('evaluation/summary.json', b'{"models": {"base": {}}}')
  (tmp_path / 'results.json').write_text(json.dumps(LM_EVAL))
  file = str(tmp_path / 'results.json')
  import_results.run_command('import', [url, file, '--model=base'])
  assert f'written to {url}/evaluation/imported.json' in capsys.readouterr().out
  assert json.loads(place.read('evaluation/imported.json'))['base']


def test_launches_that_share_a_run_have_a_lock_and_a_folder_each(url, place, monkeypatch):
  with resolve_workdir(url).open():
    assert {i: owner['replicas'] for i, owner in lease.find_owners(place).items()} == {0: 1}
  folders, numbers = [], {'CAI_JAX_NUM_REPLICAS': '2'}
  with contextlib.ExitStack() as stack:
    for replica in '10':
      for name, value in (numbers | {'CAI_JAX_REPLICA': replica}).items():
        monkeypatch.setenv(name, value)
      launch = resolve_workdir(url)
      stack.enter_context(launch.open())
      folders.append(launch.folder)
      assert lease.find_owners(place)[int(replica)]['replicas'] == 2
      with pytest.raises(UserError, match='belongs to job'), resolve_workdir(url).open():
        pass
    (pathlib.Path(folders[0]) / 'shard').write_text('1')
    direct.fetch(folders[0])
    direct.fetch(folders[1])
    assert (pathlib.Path(folders[1]) / 'shard').read_text() == '1'
    monkeypatch.setenv('CAI_JAX_NUM_REPLICAS', '3')
    with pytest.raises(UserError, match='belongs to replica 1 of 2.*this launch is replica 0 of 3'):
      launches._check_others(pathlib.Path(folders[1]), 0, 3)
  assert folders[0] != folders[1] and not lease.find_owners(place)


def test_what_needs_a_path_refuses_a_url(url):
  with pytest.raises(UserError, match=f'publish needs a local folder, and {url} is a URL'):
    publishing.run_command('publish', [url, '--repo=me/model'])
  with pytest.raises(UserError, match='publish --out needs a local folder'):
    publishing.run_command('publish', ['runs/tiny', '--repo=me/model', f'--out={url}'])
  with pytest.raises(UserError, match='A rating sheet needs a local folder'):
    rate.run_command('rate', ['export', 'runs/tiny', f'--out={url}'])
  with pytest.raises(UserError, match='is built in Python needs a local folder'):
    pipeline.build(tiny.get_config(), url)


# One test with a server of Amazon's protocol and the package that users have.


@pytest.fixture(scope='module')
def bucket():
  """URL of a bucket that a server in this process holds."""
  pytest.importorskip('s3fs')
  server = pytest.importorskip('moto.server').ThreadedMotoServer(port=0, verbose=False)
  server.start()
  host, port = server.get_host_and_port()
  values = {
    'AWS_ENDPOINT_URL': f'http://{host}:{port}',
    'AWS_ACCESS_KEY_ID': 'key',
    'AWS_SECRET_ACCESS_KEY': 'secret',
    'AWS_DEFAULT_REGION': 'us-east-1',
  }
  with pytest.MonkeyPatch.context() as patch:
    for name, value in values.items():
      patch.setenv(name, value)
    store.open_store('s3://runs').fs.mkdir('runs')
    yield 's3://runs'
  server.stop()


def test_a_bucket_of_s3_holds_a_run(bucket, tmp_path, monkeypatch):
  monkeypatch.setenv(workdir.SCRATCH, str(tmp_path / 'one'))
  run = resolve_workdir(f'{bucket}/a/run')
  with run.open() as stage_ended:
    folder = pathlib.Path(run.folder)
    (folder / 'journal').mkdir()
    lines = folder / 'journal' / 'turns-00000.jsonl'
    lines.write_bytes(b'1' * 99 + b'\n')
    (folder / 'journal' / 'sampler').touch()
    stage_ended()
    with open(lines, 'ab') as file:
      file.write(b'2' * 49 + b'\n')
    with pytest.raises(UserError, match=f'{bucket}/a/run belongs to job'):
      with resolve_workdir(f'{bucket}/a/run').open():
        pass
  monkeypatch.setenv(workdir.SCRATCH, str(tmp_path / 'two'))
  again = resolve_workdir(f'{bucket}/a/run')
  with again.open():
    copy = pathlib.Path(again.folder) / 'journal' / 'turns-00000.jsonl'
    assert copy.read_bytes() == lines.read_bytes()
    assert copy.stat().st_mtime_ns == lines.stat().st_mtime_ns
    assert (copy.parent / 'sampler').stat().st_size == 0
  with pytest.raises(UserError, match='s3://missing/run cannot be used.*Create the bucket'):
    with resolve_workdir('s3://missing/run').open():
      pass
