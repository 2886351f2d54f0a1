"""An object store in memory that tests can make fail, and helpers to write and read folders."""

import time
import uuid

from fsspec.implementations.memory import MemoryFileSystem

from cai_jax.runtime.cloud.index import scan
from cai_jax.runtime.cloud.mirror import Mirror
from cai_jax.runtime.cloud.store import Store


class Faulty(MemoryFileSystem):
  """An object store in memory that records its calls, and fails from one of them on.

  Attributes:
    calls: the changes so far, as 'write NAME' and 'delete NAME'.
    left: number of changes that still succeed.
    away: whether every call fails.
  """

  protocol = 'faulty'
  cachable = False

  def __init__(self):
    super().__init__()
    self.store, self.pseudo_dirs = {}, ['']  # of this instance only
    self.calls, self.left, self.away = [], 10**9, False

  def _count(self, verb, path):
    if self.away or self.left <= 0:
      raise ConnectionError('the store is away')
    self.left -= 1
    self.calls.append(f'{verb} {path.removeprefix("/bucket/run/")}')

  def pipe_file(self, path, value, mode='overwrite', **options):
    self._count('write', path)
    super().pipe_file(path, bytes(value), mode, **options)

  def put_file(self, lpath, rpath, **options):
    self._count('write', rpath)
    super().put_file(lpath, rpath, **options)

  def rm_file(self, path):
    self._count('delete', path)
    super().rm_file(path)

  def find(self, path, **options):
    if self.away:
      raise ConnectionError('the store is away')
    return super().find(path, **options)


def make_store(monkeypatch):
  """An empty store, for mirrors that see files of the same tick of the disk's clock."""
  # Such a clock has ticks of milliseconds, and these tests write several files in one.
  monkeypatch.setattr(Mirror, '_now', lambda self: time.time_ns() + 10**9)
  return Store('s3://bucket/run', Faulty(), '/bucket/run')


def write(folder, files):
  for name, content in files.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name('.temporary')
    temporary.write_bytes(content)
    temporary.replace(path)


def append(path, content):
  with open(path, 'ab') as file:
    file.write(content)


def read(folder):
  return {name: (folder / name).read_bytes() for name in scan(folder)}


def start(store, folder, job=''):
  """A mirror after its first pull, as the start of a job makes it."""
  mirror = Mirror(store, folder, job or uuid.uuid4().hex[:12])
  mirror.pull()
  return mirror


def files(store):
  """Files that a new machine would see, by name."""
  return {name for name in store.list() if not name.startswith('.cai_jax/')}


FILES = {
  'manifest.json': b'{"stages": 1}',
  'd_cai/dataset_info.json': b'{}',
  'd_cai/d_cai-train.array_record-00000': b'rows',
  'journal/sampler-gumbel-1': b'',
  'journal/turns-00000.jsonl': b'one\ntwo\n',
  'checkpoints/2/_CHECKPOINT_METADATA': b'complete',
  'checkpoints/2/commit_success.txt': b'complete',
  'checkpoints/2/state/d/0': b'numbers',
}
