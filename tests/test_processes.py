"""The processes of a run: joining them, and failing together."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from cai_jax.runtime import processes
from cai_jax.runtime.errors import NonFiniteError, StoppedError, UserError
from tests.pipeline_setup import start_two


@pytest.mark.parametrize(
  ('environment', 'joins'),
  [
    ({}, None),
    ({'COORDINATOR_ADDRESS': 'a:1', 'NUM_PROCESSES': '2', 'PROCESS_ID': '0'}, ('a:1', 2, 0)),
    ({'COORDINATOR_ADDRESS': 'auto'}, ()),
    ({'SLURM_NTASKS': '4'}, None),  # salloc without srun
    ({'SLURM_NTASKS': '4', 'SLURM_STEP_NUM_TASKS': '4'}, ()),
    ({'SLURM_STEP_NUM_TASKS': '1'}, None),
    ({'OMPI_COMM_WORLD_SIZE': '2'}, ()),
    ({'TPU_WORKER_HOSTNAMES': 'localhost'}, None),
    ({'TPU_WORKER_HOSTNAMES': 'a,b'}, ()),
  ],
)
def test_environment_decides_which_processes_are_joined(monkeypatch, environment, joins):
  calls = []
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *args, **_: calls.append(args))
  monkeypatch.setattr(jax.config, 'update', lambda *_: None)
  _set(monkeypatch, environment)
  processes.initialize()
  assert calls == ([] if joins is None else [joins])


@pytest.mark.parametrize(
  ('environment', 'options'),
  [
    ({'SLURM_STEP_TASKS_PER_NODE': '1(x2)', 'SLURM_GPUS_ON_NODE': '4'}, [0, 1, 2, 3]),
    ({'SLURM_STEP_TASKS_PER_NODE': '4(x2)', 'SLURM_GPUS_ON_NODE': '4'}, None),
    ({'SLURM_STEP_TASKS_PER_NODE': '1(x2)'}, None),  # nodes without GPUs
  ],
)
def test_one_slurm_process_on_each_node_gets_all_gpus_of_the_node(
  monkeypatch, environment, options
):
  calls = []
  monkeypatch.setattr(jax.distributed, 'initialize', lambda **options: calls.append(options))
  monkeypatch.setattr(jax.config, 'update', lambda *_: None)
  _set(monkeypatch, {'SLURM_STEP_NUM_TASKS': '2'} | environment)
  processes.initialize()
  assert calls == [{'local_device_ids': options}]


def test_an_address_is_not_overruled_by_the_environment_of_slurm(monkeypatch):
  calls = []
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *_, **options: calls.append(options))
  monkeypatch.setattr(jax.config, 'update', lambda *_: None)
  _set(monkeypatch, {'COORDINATOR_ADDRESS': 'a:1', 'NUM_PROCESSES': '2', 'PROCESS_ID': '1'})
  processes.initialize()
  assert calls == [{'cluster_detection_method': 'deactivate'}]


def test_address_without_process_id_is_refused(monkeypatch):
  _set(monkeypatch, {'COORDINATOR_ADDRESS': 'a:1', 'NUM_PROCESSES': '2'})
  with pytest.raises(UserError, match='COORDINATOR_ADDRESS=a:1 is set, but PROCESS_ID is missing'):
    processes.initialize()


def _set(monkeypatch, environment):
  for name in (
    *('COORDINATOR_ADDRESS', 'NUM_PROCESSES', 'PROCESS_ID', 'SLURM_NTASKS'),
    *('SLURM_STEP_NUM_TASKS', 'SLURM_STEP_TASKS_PER_NODE', 'SLURM_GPUS_ON_NODE'),
    *('OMPI_COMM_WORLD_SIZE', 'TPU_WORKER_HOSTNAMES'),
  ):
    monkeypatch.delenv(name, raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
  ('error', 'kind'),
  [
    (UserError('no such file'), UserError),
    (NonFiniteError('NaN'), StoppedError),
    (RuntimeError('a bug'), StoppedError),
  ],
)
def test_failure_of_another_process_says_whether_work_was_done(monkeypatch, error, kind):
  outcomes = np.array([[0, False], [processes._outcome(error), False]])
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(processes.multihost_utils, 'process_allgather', lambda _: outcomes)
  with pytest.raises(UserError, match='^Process 1 could not write. See the output') as caught:
    processes.run_on_all_processes('write', lambda: None)
  assert type(caught.value) is kind


@pytest.mark.parametrize(
  ('error', 'traceback'), [(UserError('no such file'), False), (RuntimeError('a bug'), True)]
)
def test_an_error_is_printed_before_the_other_processes_finish(
  monkeypatch, capsys, error, traceback
):
  printed = []

  def allgather(outcome):
    printed.append(capsys.readouterr().err)
    return np.array([outcome, [0, False]])

  def work():
    raise error

  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(processes.multihost_utils, 'process_allgather', allgather)
  with pytest.raises(type(error)):
    processes.run_on_all_processes('write', work)
  assert printed[0].startswith(f'process 0 could not write: {error}\n')
  assert ('Traceback' in printed[0]) == traceback
  assert traceback or printed[0].count('\n') == 1


class Files:
  """Of two processes that share no folder."""

  def __init__(self):
    self.calls = []

  def send(self):
    self.calls.append('send')
    return False

  def receive(self):
    self.calls.append('receive')


def test_processes_fetch_files_if_one_of_them_has_sent_any(monkeypatch):
  files, other = Files(), [True, False, False]  # whether the other process has sent any
  gather = lambda own: np.array([own, [0, other.pop(0)]])  # noqa: E731
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(processes.multihost_utils, 'process_allgather', gather)
  with processes.exchanging(files):
    assert processes.run_on_all_processes('write', lambda: files.calls.append('work')) is None
    assert files.calls == ['work', 'send', 'receive']
    processes.barrier('nothing new')
    assert files.calls == ['work', 'send', 'receive', 'send']
  other[:] = [False]
  processes.barrier('outside')
  assert len(files.calls) == 4


def test_process_0_alone_does_its_work(monkeypatch):
  assert processes.run_on_process_0('count', lambda: 3) == 3
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  assert processes.run_on_process_0('count', lambda: 1 / 0) is None


FAILS_IN_ONE = """
import sys
import jax
from cai_jax import cli
from cai_jax.runtime import processes
from cai_jax.runtime.errors import UserError

def work():
  if jax.process_index() == 1:
    raise {error}('no more room')

with cli.short_errors():
  processes.initialize()
  processes.run_on_all_processes('write', work)
"""


@pytest.mark.slow
@pytest.mark.parametrize(('error', 'traceback'), [('UserError', False), ('RuntimeError', True)])
def test_all_processes_end_when_one_fails(error, traceback):
  code = FAILS_IN_ONE.format(error=error)
  pair = start_two([sys.executable, '-c', code], 1, stderr=subprocess.PIPE, text=True)
  errors = [process.communicate()[1] for process in pair]
  assert [process.returncode for process in pair] == [1, 1]
  assert 'error: Process 1 could not write. See the output of that process.' in errors[0]
  assert 'no more room' in errors[1] and 'no more room' not in errors[0]
  assert ['Traceback' in text for text in errors] == [False, traceback]
