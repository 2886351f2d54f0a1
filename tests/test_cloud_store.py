"""Stores behind URLs: objects are moved whole, and a fault says what to do."""

import uuid

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cai_jax.runtime.cloud import store as stores
from cai_jax.runtime.cloud.store import Entry, check_writable, explain, is_url, open_store
from cai_jax.runtime.errors import UserError


@pytest.fixture
def store():
  return open_store(f'memory://bucket/{uuid.uuid4().hex}/run/')


@pytest.mark.parametrize(
  ('path', 'expected'),
  [
    ('s3://bucket/run', True),
    ('gs://bucket', True),
    ('memory://x', True),
    ('runs/tiny', False),
    ('/runs/a:b', False),
    ('C:/runs', False),
    ('', False),
  ],
)
def test_urls_are_told_from_paths(path, expected):
  assert is_url(path) is expected


def test_objects_are_written_listed_and_read(store, tmp_path):
  first = store.write('a/b.txt', b'hello')
  (tmp_path / 'c').write_bytes(b'world!')
  assert store.upload('a/c.txt', tmp_path / 'c') == store.entry('a/c.txt')
  listed = store.list()
  assert {name: entry.size for name, entry in listed.items()} == {'a/b.txt': 5, 'a/c.txt': 6}
  assert listed['a/b.txt'] == first != store.write('a/b.txt', b'hellp')
  assert store.list('a').keys() == listed.keys() and store.list('nothing') == {}
  store.download('a/b.txt', tmp_path / 'deep' / 'copy')
  assert (tmp_path / 'deep' / 'copy').read_bytes() == store.read('a/b.txt') == b'hellp'
  assert [path.name for path in (tmp_path / 'deep').iterdir()] == ['copy']
  store.delete('a/b.txt')
  store.delete('a/b.txt')
  assert [*store.list()] == ['a/c.txt']


def test_a_url_may_be_one_object(store):
  store.write('prompts.jsonl', b'{}\n')
  one = open_store(f'{store.url}/prompts.jsonl')
  assert [*one.list()] == [''] and one.read('') == b'{}\n'


def test_an_object_is_created_once(store):
  store.create('lock', b'mine')
  with pytest.raises(FileExistsError):
    store.create('lock', b'yours')
  assert store.read('lock') == b'mine'


def test_s3_says_that_an_object_exists_by_a_code():
  """s3fs raises an OSError whose cause is the error of botocore."""
  error, cause = OSError(22, 'At least one of the pre-conditions'), Exception()
  cause.response = {'Error': {'Code': 'PreconditionFailed'}}
  error.__cause__ = cause
  assert stores._is_conflict(error) and not stores._is_conflict(OSError(22, 'other'))


def test_an_object_that_was_cut_is_an_error(store, tmp_path, monkeypatch):
  (tmp_path / 'x').write_bytes(b'hello')
  fs = type(store.fs)
  monkeypatch.setattr(fs, 'put_file', lambda self, _, path: self.pipe_file(path, b'hell'))
  with pytest.raises(OSError, match='has 4 bytes, and 5 were sent'):
    store.upload('x', tmp_path / 'x')
  pipe_file = fs.pipe_file
  monkeypatch.setattr(fs, 'pipe_file', lambda self, path, value: pipe_file(self, path, value[:-1]))
  with pytest.raises(OSError, match='has 4 bytes, and 5 were sent'):
    store.write('x', b'hello')


def test_a_failed_download_leaves_the_old_file(store, tmp_path):
  (tmp_path / 'x').write_bytes(b'old')
  with pytest.raises(FileNotFoundError):
    store.download('nothing', tmp_path / 'x')
  assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [('x', b'old')]


def test_a_writable_store_is_left_as_it_was(store):
  check_writable(store)
  assert store.list() == {}


def test_a_store_that_creates_twice_is_refused(store, monkeypatch):
  monkeypatch.setattr(
    store.fs, 'pipe_file', lambda path, value, **_: type(store.fs).pipe_file(store.fs, path, value)
  )
  with pytest.raises(UserError, match='does not support conditional writes'):
    check_writable(store)
  assert store.list() == {}


class LooksFirst(MemoryFileSystem):
  """A filesystem with fsspec's own `pipe_file`, which looks first and writes then."""

  protocol = 'looksfirst'
  pipe_file = fsspec.AbstractFileSystem.pipe_file


def test_a_store_that_looks_first_is_refused():
  store = stores.Store('looksfirst://bucket/run', LooksFirst(), '/looksfirst/run')
  with pytest.raises(UserError, match='does not support conditional writes'):
    check_writable(store)


@pytest.mark.parametrize(
  ('url', 'message'),
  [
    ('nosuch://bucket/run', 'there is no store for nosuch://'),
    ('file:///runs/tiny', 'Give its path, without file://'),
    ('memory://', 'names no bucket'),
    ('runs/tiny', 'is not a URL'),
  ],
)
def test_wrong_urls_are_refused(url, message):
  with pytest.raises(UserError, match=message):
    open_store(url)


def test_a_missing_package_is_named(monkeypatch):
  def fail(*_, **__):
    raise ImportError('Install s3fs to access S3')

  monkeypatch.setattr(fsspec, 'filesystem', fail)
  with pytest.raises(UserError, match=r"Install s3fs.*pip install 'cai_jax\[cloud\]'"):
    open_store('s3://bucket/run')


class NoCredentialsError(Exception):
  """As botocore raises it."""


@pytest.mark.parametrize(
  ('url', 'error', 'message'),
  [
    ('s3://b/r', NoCredentialsError('Unable to locate credentials'), 'aws configure'),
    ('gs://b/r', Exception('Anonymous caller does not have access, 401'), 'gcloud auth'),
    ('s3://b/r', PermissionError('Access Denied'), 'right to list, read, write'),
    ('gs://b/r', OSError('Forbidden: b/r'), 'right to list, read, write'),
    ('s3://b/r', FileNotFoundError('The specified bucket does not exist'), 'Create the bucket'),
    ('s3://b/r', TimeoutError('timed out'), 'Check the network'),
  ],
)
def test_faults_say_what_to_do(url, error, message):
  text = explain(url, error)
  assert text.startswith(url) and message in text and str(error) in text
  store = stores.Store(url, None, '')
  with pytest.raises(UserError, match=message), store.asking():
    raise error


def test_entries_have_a_version_whatever_the_store_calls_it():
  etag = stores._entry({'size': 3, 'ETag': '"abc"'})
  assert etag == stores._entry({'size': 3, 'ETag': '"abc"', 'LastModified': 'now'})
  assert etag != stores._entry({'size': 3, 'ETag': '"abd"'})
  assert isinstance(etag, Entry) and len(stores._entry({'size': 0, 'generation': 7}).version) == 16
