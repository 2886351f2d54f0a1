"""Runs of several processes on an object store: each has a folder of its own, and no other does.

Orbax writes their checkpoints straight to the store, so only a server of Google's protocol serves.
"""

import json
import re
import shutil
import signal
import subprocess
import time

import pytest

from cai_jax.data.quality import FLAGS
from cai_jax.runtime.cloud.index import scan
from cai_jax.runtime.cloud.store import open_store
from cai_jax.runtime.cloud.workdir import SCRATCH, scratch_folder
from tests.cloud_setup import serve
from tests.pipeline_setup import launch_tiny, start_one, start_two
from tests.test_preference_processes import command as label_and_prefer

pytestmark = pytest.mark.slow

STAGES = 'generate,train,evaluate,report'
FIELDS = {'train.checkpoint_every': 4, 'train.epochs': 1}
TIMES = {'manifest.json', 'costs.jsonl', 'report.html'}  # have seconds of stages or of steps
CHANCE = re.compile(r'(^|/)(checkpoints|tensorboard)/')  # libraries choose names by chance and time


@pytest.fixture
def bucket(monkeypatch):
  with serve('gs', monkeypatch) as url:
    yield url


def lines(folder):
  """Number of lines of all records in a folder."""
  return sum(path.read_bytes().count(b'\n') for path in folder.glob('*.jsonl'))


def finish(processes):
  """Wait for all processes; each prints what it prints."""
  assert [process.wait(timeout=600) for process in processes] == [0, 0]


def kill(processes, is_time, others_end=True):
  """Kill process 1 at a moment; another of the same launch then ends as well."""
  end = time.monotonic() + 600
  while not is_time():
    assert [process.poll() for process in processes] == [None, None]
    assert time.monotonic() < end
    time.sleep(0.1)
  processes[1].send_signal(signal.SIGKILL)
  assert not others_end or all(process.wait(timeout=300) for process in processes)


def fields_of(model):
  """Settings of a run of seconds, which all processes sample together."""
  return {
    'model.base': model,
    'mesh_sampling.processes': -1,
    'feedback.rounds': 1,
    'feedback.shard_rows': 2,
    'prompts.harmful.limit': 6,
    'prompts.helpful.limit': 4,
    **{f'feedback.max_rate.{name}': 1.0 for name in FLAGS},
  }


def content(store):
  """What a user would fetch, by name."""
  names = {n for n in store.list() if not n.startswith('.cai_jax/')}
  return {n: store.read(n) for n in names}


def check_equal(shared, store):
  """Compare a folder and a store, but for times, names and the order of turns; return both."""
  local = {name: (shared / name).read_bytes() for name in scan(shared)}
  remote = content(store)
  fixed = lambda files: {n for n in files if not CHANCE.search(n)}  # noqa: E731
  assert fixed(remote) == fixed(local)
  journal = {n for n in fixed(local) if n.startswith('journal/turns-')}
  differing = {n for n in fixed(local) if remote[n] != local[n]}
  print('names that differ:', sorted(differing))
  assert {n for n in differing if n.rpartition('/')[2] not in TIMES} <= journal
  lines = lambda files: sorted(line for n in journal for line in files[n].splitlines())  # noqa: E731
  assert lines(remote) == lines(local)
  return local, remote


def test_two_processes_without_a_common_folder_end_as_those_with_one(bucket, tmp_path, monkeypatch):
  monkeypatch.setenv(SCRATCH, str(tmp_path / 'scratch'))
  url = f'{bucket}/run'
  store, command = open_store(url), launch_tiny(url, STAGES, FIELDS)
  own = scratch_folder(url)
  moments = {
    'generate': lambda: len(store.list('.cai_jax/parts')) > 2,  # some lines of both processes
    'train': lambda: any(store.list('checkpoints')) and lines(own) > 6,
    'evaluate': lambda: (own / 'evaluation/base/d_cai-train.array_record-00000').exists(),
  }
  for stage, is_time in moments.items():
    kill(start_two(command, 2), is_time)
    done = json.loads(store.read('manifest.json'))['stages']
    assert stage in done and 'finished' not in done[stage]
    shutil.rmtree(tmp_path / 'scratch')  # the machines are lost
  finish(start_two(command, 2))
  shared = tmp_path / 'local' / 'run'
  finish(start_two(launch_tiny(shared, STAGES, FIELDS), 2))
  local, remote = check_equal(shared, store)
  steps = lambda files: {m[0] for n in files if (m := re.match(r'checkpoints/\d+', n))}  # noqa: E731
  assert steps(remote) == steps(local)
  assert not (own / 'checkpoints').exists()


def test_labels_and_policies_need_no_common_folder(bucket, random_model, tmp_path, monkeypatch):
  monkeypatch.setenv(SCRATCH, str(tmp_path / 'scratch'))
  url, shared = f'{bucket}/run', tmp_path / 'run'
  finish(start_two(label_and_prefer(random_model, url), 1))
  finish(start_two(label_and_prefer(random_model, shared), 1))
  local, _ = check_equal(shared, open_store(url))
  assert {'labels/comparisons.jsonl', 'policy/model.safetensors'} <= local.keys()


def test_a_replica_without_a_common_folder_samples_into_s3_but_does_not_train(
  random_model, tmp_path, monkeypatch
):
  monkeypatch.setenv(SCRATCH, str(tmp_path / 'scratch'))
  fields = fields_of(random_model)
  with serve('s3', monkeypatch) as bucket:
    url, shared = f'{bucket}/run', tmp_path / 'run'
    finish(start_two(launch_tiny(url, 'generate', fields), 1))
    finish(start_two(launch_tiny(shared, 'generate', fields), 1))
    check_equal(shared, open_store(url))
    group = start_two(launch_tiny(url, 'train', fields), 1, stderr=subprocess.PIPE, text=True)
    assert 'can write checkpoints to gs:// only' in group[0].communicate()[1]
    assert [process.wait() for process in group] == [1, 1]
    # One process goes on where several have stopped.
    assert start_one(launch_tiny(url, 'generate', fields), 1).wait() == 0


def test_launches_without_a_common_folder_sample_the_shards_of_one(
  random_model, tmp_path, monkeypatch
):
  """Of two launches, the second is killed; then both are started again."""
  monkeypatch.setenv(SCRATCH, str(tmp_path / 'scratch'))
  fields = fields_of(random_model)
  fields |= {'prompts.harmful.limit': 24, 'mesh_sampling.processes': 1, 'engine.slots': 4}
  with serve('s3', monkeypatch) as bucket:
    url, shared = f'{bucket}/run', tmp_path / 'run'
    store, command = open_store(url), launch_tiny(url, 'generate', fields)

    def start(**options):
      numbers = {'CAI_JAX_NUM_REPLICAS': '2'}
      return [start_one(command, 1, options, CAI_JAX_REPLICA=str(i), **numbers) for i in range(2)]

    launches = start(stderr=subprocess.PIPE, text=True)
    first, last = (f'd_cai/d_cai-train.array_record-{shard:05d}' for shard in (1, 13))
    own = scratch_folder(url)
    other = own.parent.with_name(f'{own.parent.name}-1-0') / own.name
    kill(launches, (other / first).exists, others_end=False)
    assert 'Replica 1 of 2 is not running' in launches[0].communicate(timeout=300)[1]
    assert launches[0].returncode == 1  # its shards are complete, and others are missing
    assert last not in store.list('d_cai')
    finish(start())
    assert last in store.list('d_cai')
    assert start_one(launch_tiny(shared, 'generate', fields), 1).wait() == 0
    local = {p.name: p.read_bytes() for p in shared.glob('d_cai/*.array_record-*')}
    assert {n: store.read(f'd_cai/{n}') for n in local} == local and len(local) > 8
