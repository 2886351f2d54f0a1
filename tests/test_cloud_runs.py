"""Runs and experiments on an object store, killed on machines that are lost, end as local ones.

A server of the store's protocol runs as a process of its own, and the run's programs reach it as
they would reach Amazon or Google.
"""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from cai_jax.runtime.cloud.index import scan
from cai_jax.runtime.cloud.store import open_store
from cai_jax.runtime.cloud.workdir import SCRATCH, scratch_folder
from tests.cloud_setup import SERVERS, serve
from tests.pipeline_setup import ROOT, launch_tiny

pytestmark = pytest.mark.slow

FIELDS = {'train.checkpoint_every': 4}
SECONDS = 10  # at most so many seconds of turns are sampled again

# Names that differ between two local runs, and what is in them.
TIMES = {
  'manifest.json',  # times, seconds and peak memory
  'costs.jsonl',  # seconds of steps
  'report.html',  # seconds of stages
}
NAMES = ('checkpoints/', 'tensorboard/')  # Orbax and TensorBoard choose names by chance and time
JOURNAL = 'journal/turns-00000.jsonl'  # a line per chain, in the order in which they ended


@pytest.fixture(params=[*SERVERS])
def bucket(request, monkeypatch):
  """URL of a bucket in a server that is a process of its own."""
  with serve(request.param, monkeypatch) as url:
    yield url


def count_lines(path):
  return path.read_bytes().count(b'\n') if path.exists() else 0


def stored_lines(store):
  """Number of lines of the journal that a new machine would find, in the object and its parts."""
  parts = [name for name in store.list('.cai_jax/parts') if '/journal/' in name]
  whole = [JOURNAL] if JOURNAL in store.list('journal') else []
  return sum(store.read(name).count(b'\n') for name in whole + parts)


def watch(process, journal, is_time):
  """Wait for the moment of a kill; return the growth of the journal, as (time, lines)."""
  growth = []
  while not is_time():
    assert process.poll() is None
    growth.append((time.monotonic(), count_lines(journal)))
    time.sleep(0.1)
  process.send_signal(signal.SIGKILL)
  growth.append((time.monotonic(), count_lines(journal)))
  assert process.wait() == -signal.SIGKILL
  return growth


def lines_before(growth, seconds):
  """Number of lines so many seconds before the last moment."""
  end = growth[-1][0] - seconds
  return max([lines for moment, lines in growth if moment <= end], default=0)


def test_a_run_that_is_killed_three_times_ends_as_a_local_one(bucket, tmp_path, monkeypatch):
  monkeypatch.setenv(SCRATCH, str(tmp_path / 'scratch'))
  url, stages = f'{bucket}/run', 'generate,train,evaluate,report'
  scratch, store = scratch_folder(url), open_store(url)
  start = functools.partial(subprocess.Popen, cwd=ROOT, env=os.environ | {'XLA_FLAGS': ''})
  journal, begun = scratch / JOURNAL, []

  def has_sampled():
    if not begun and count_lines(journal) > 5:
      begun.append(time.monotonic())
    return begun and time.monotonic() > begun[0] + 12

  moments = {
    'generate': has_sampled,
    'train': lambda: count_lines(scratch / 'metrics.jsonl') >= 14,
    'evaluate': lambda: (scratch / 'evaluation/base/d_cai-train.array_record-00001').exists(),
  }
  lost = {}
  for stage, is_time in moments.items():
    process = start(launch_tiny(url, stages, FIELDS))
    growth = watch(process, journal, is_time)
    there = stored_lines(store)
    assert there >= lines_before(growth, SECONDS)
    lost[stage] = growth[-1][1] - there, lines_before(growth, 0) - lines_before(growth, SECONDS)
    done = json.loads(store.read('manifest.json'))['stages']
    assert stage in done and 'finished' not in done[stage]  # killed in the middle
    shutil.rmtree(tmp_path / 'scratch')  # the machine is lost
  print('chains lost and sampled in the last 10 s, by stage:', lost)
  assert start(launch_tiny(url, stages, FIELDS)).wait() == 0
  other = tmp_path / 'local' / 'run'
  assert start(launch_tiny(other, stages, FIELDS)).wait() == 0
  local = {name: (other / name).read_bytes() for name in scan(other)}
  remote = {n: store.read(n) for n in store.list() if not n.startswith('.cai_jax/')}
  fixed = lambda files: {n for n in files if not n.startswith(NAMES)}  # noqa: E731
  assert fixed(remote) == fixed(local)
  differing = {name for name in fixed(local) if remote[name] != local[name]}
  assert differing <= TIMES | {JOURNAL}
  for report in (local['report.html'], remote['report.html']):  # the seconds differ, not the title
    assert re.search(rb'<title>(.*?)</title>', report)[1] == b'run'
  assert sorted({*remote[JOURNAL].splitlines()}) == sorted({*local[JOURNAL].splitlines()})
  print('names that differ:', sorted(differing))
  print('equal:', len(fixed(local)) - len(differing))


LAB = """
from cai_jax.experiment import Arm, Experiment


def get_experiment():
  limits = {'harmful': 16, 'helpful': 8, 'eval_harmful': 6, 'eval_helpful': 4}
  return Experiment(
    {'first': Arm({}, 'aligned'), 'second': Arm({}, 'aligned', start='first')},
    reference='first',
    overrides={f'prompts.{name}.limit': limit for name, limit in limits.items()}
    | {'feedback.rounds': 1, 'train.epochs': 1, 'engine.slots': 8},
    seeds=(0,),
  )
"""


def launch_lab(file, workdir):
  """Return the command of an experiment."""
  names = f'--experiment={file}', f'--workdir={workdir}'
  return [sys.executable, '-m', 'cai_jax.experiment', *names]


def without_times(results):
  """Results without what depends on the time, and on how often the experiment was started."""
  costs = [
    {k: v for k, v in row.items() if k not in ('seconds', 'peak_memory_bytes', 'reused_turns')}
    for row in results['costs']
  ]
  return results | {'costs': costs}


@pytest.mark.parametrize('bucket', ['s3'], indirect=True)
def test_an_experiment_continues_on_a_machine_with_another_folder(bucket, tmp_path, monkeypatch):
  """It is killed while a run trains that starts from the model of another run."""
  url, file = f'{bucket}/lab', tmp_path / 'chain.py'
  file.write_text(f'"""Does it continue?"""\n{LAB}')
  monkeypatch.setenv(SCRATCH, str(tmp_path / 'one'))
  start = functools.partial(
    subprocess.Popen, cwd=ROOT, env=os.environ | {'XLA_FLAGS': ''}, stdout=subprocess.PIPE
  )
  store, process = open_store(url), start(launch_lab(file, url))
  lines = iter(process.stdout.readline, b'')
  assert any(line.startswith(b'[2/2]') for line in lines)
  assert any(line.startswith(b'train ...') for line in lines)
  process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  shutil.rmtree(tmp_path / 'one')  # the machine is lost
  names = [name for name in store.list('runs') if name.endswith('/manifest.json')]
  stages = [json.loads(store.read(name))['stages'] for name in names]
  first, second = sorted(stages, key=len, reverse=True)
  model = second['generate']['settings']['model']['base']
  assert model.startswith(f'{url}/runs/') and model.removeprefix(f'{url}/') + '/config.json' in (
    store.list('runs')
  )
  assert 'finished' in first['report'] and 'finished' not in second.get('train', {})

  def continue_in(folder):
    monkeypatch.setenv(SCRATCH, str(tmp_path / folder))
    environment = os.environ | {'XLA_FLAGS': ''}
    command = launch_lab(file, url)
    return subprocess.run(
      command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )

  again = continue_in('two')
  assert again.stdout.splitlines()[-1] == f'report: {url}/chain/report.html'
  assert again.stdout.count('generate: done before') == 2
  assert str(scratch_folder(url)) not in again.stdout.partition('\n')[2]  # but where it works
  local = tmp_path / 'local' / 'lab'
  assert start(launch_lab(file, local)).communicate() and (local / 'chain').is_dir()
  results = [
    json.loads(content)
    for content in (store.read('chain/results.json'), (local / 'chain/results.json').read_bytes())
  ]
  assert without_times(results[0]) == without_times(results[1])
  remote = {n: store.read(n) for n in store.list() if not n.startswith('.cai_jax/')}
  here = {n for n, content in remote.items() if str(tmp_path).encode() in content}
  assert all(re.search(r'/checkpoints/|/digests\.json$', name) for name in here)
  for name in scan(local):  # texts and models, byte for byte
    if name.endswith('.safetensors') or 'array_record' in name:
      assert remote[name] == (local / name).read_bytes()
  # A third machine finds everything done, and changes nothing.
  assert '0 of 2 runs had work left: 0 turns sampled' in continue_in('three').stdout
  after = {n: store.read(n) for n in store.list() if not n.startswith('.cai_jax/')}
  assert after == remote
