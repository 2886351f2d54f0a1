"""Two processes of four devices train like one process of eight, and SIGTERM stops both."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.training_setup import read_rows

RUN = """
import dataclasses, sys, jax, numpy as np
from jax.experimental import multihost_utils
from cai_jax.runtime import processes
processes.initialize()
from cai_jax.runtime.mesh import make_mesh
from cai_jax.runtime.interruption import Interrupted
from cai_jax.training.loop import Monitoring, fit
from tests.training_setup import CONFIG, MODEL, initial_params, random_examples
workdir, count = sys.argv[1], int(sys.argv[2])
examples = random_examples(count)
config = dataclasses.replace(
  CONFIG, epochs=1, checkpoint_every=1000, eval_share=0.1, eval_every=10)
try:
  trained, _ = fit(MODEL, jax.device_get(initial_params()), examples, config, make_mesh(2, 2, 2),
                   workdir, monitoring=Monitoring(examples[:20]))
except Interrupted as error:
  print(f'preempted: {error}', flush=True)
  sys.exit(143)
if jax.process_count() > 1:
  trained = multihost_utils.process_allgather(trained, tiled=True)
if jax.process_index() == 0:
  np.savez(workdir + '/end.npz', *jax.tree.leaves(jax.device_get(trained)))
"""
ROOT = pathlib.Path(__file__).parents[1]


def start(workdir, count, devices, **environment):
  flags = f'--xla_force_host_platform_device_count={devices}'
  environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'} | environment
  workdir.mkdir(exist_ok=True)
  return subprocess.Popen(
    [sys.executable, '-c', RUN, str(workdir), str(count)],
    env=environment | {'XLA_FLAGS': flags},
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )


def start_two(workdir, count):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  names = {'COORDINATOR_ADDRESS': address, 'NUM_PROCESSES': '2'}
  return [start(workdir, count, 4, PROCESS_ID=str(i), **names) for i in range(2)]


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
  """Compares more than 20 steps on a 2×2×2 mesh."""
  assert start(tmp_path / 'one', 600, 8).wait() == 0
  assert [p.wait() for p in start_two(tmp_path / 'two', 600)] == [0, 0]
  one, two = read_rows(tmp_path / 'one'), read_rows(tmp_path / 'two')
  assert len(one) == len(two) > 20
  for a, b in zip(one, two, strict=True):
    assert a['loss'] == pytest.approx(b['loss'], rel=1e-5)
  held_out = [read_rows(tmp_path / name, 'held_out.jsonl')[-1]['loss'] for name in ('one', 'two')]
  assert held_out[0] == pytest.approx(held_out[1], rel=1e-5)
  with np.load(tmp_path / 'one/end.npz') as a, np.load(tmp_path / 'two/end.npz') as b:
    for name in a:
      np.testing.assert_allclose(a[name], b[name], atol=1e-5)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_both_resume_exactly(tmp_path):
  assert [p.wait() for p in start_two(tmp_path / 'whole', 2000)] == [0, 0]
  pair, metrics = start_two(tmp_path / 'cut', 2000), tmp_path / 'cut' / 'metrics.jsonl'
  while not metrics.exists() or metrics.read_bytes().count(b'\n') < 5:
    assert [p.poll() for p in pair] == [None, None]
    time.sleep(0.01)
  pair[1].send_signal(signal.SIGTERM)
  outputs = [p.communicate()[0] for p in pair]
  assert [p.returncode for p in pair] == [143, 143]
  assert all('preempted: Stopped after step' in text for text in outputs)
  (saved,) = [int(p.name) for p in (tmp_path / 'cut/checkpoints').iterdir() if p.name.isdigit()]
  assert [p.wait() for p in start_two(tmp_path / 'cut', 2000)] == [0, 0]
  whole, cut = read_rows(tmp_path / 'whole'), read_rows(tmp_path / 'cut')
  assert whole == cut and 5 <= saved < len(whole)
  with np.load(tmp_path / 'whole/end.npz') as a, np.load(tmp_path / 'cut/end.npz') as b:
    assert all(np.array_equal(a[name], b[name]) for name in a)
