"""Weights & Biases: it gets the scalars of TensorBoard, and a resumed run is one run there."""

import dataclasses
import importlib.machinery
import shutil
import sys
import types

import jax
import numpy as np
import pytest

from cai_jax.model.transformer import init_params
from cai_jax.runtime.errors import UserError
from cai_jax.training.config import TrainConfig
from cai_jax.training.log import TrainingLog
from cai_jax.training.tensorboard import EventWriter
from cai_jax.training.workload import Workload
from tests.test_training_monitoring import CONFIG, MODEL, fit
from tests.training_setup import random_examples

SHORT = dataclasses.replace(CONFIG, epochs=2, checkpoint_every=2)
EXAMPLES = random_examples(30)
WORKLOAD = Workload(np.zeros(1), np.zeros(1), None, lambda index: [])


@pytest.fixture(scope='module')
def params():
  return init_params(MODEL, jax.random.key(0))


@pytest.fixture
def wandb_runs(monkeypatch):
  """Replaces the package wandb by a fake, and lists the runs that it was asked to start."""
  runs = []

  def init(**options):
    run = types.SimpleNamespace(options=options, rows=[], metrics=[], exit_codes=[])
    run.log = run.rows.append
    run.define_metric = lambda name, step_metric=None: run.metrics.append((name, step_metric))
    run.finish = lambda exit_code: run.exit_codes.append(exit_code)
    runs.append(run)
    return run

  package = types.ModuleType('wandb')
  package.init = init
  package.__spec__ = importlib.machinery.ModuleSpec('wandb', None, origin='wandb/__init__.py')
  monkeypatch.setitem(sys.modules, 'wandb', package)
  return runs


@pytest.fixture
def tensorboard_scalars(monkeypatch):
  """Lists the scalars that TensorBoard receives: (name, value, step)."""
  scalars = []
  add_scalar = EventWriter.add_scalar

  def record(self, name, value, step):
    scalars.append((name, value, step))
    add_scalar(self, name, value, step)

  monkeypatch.setattr(EventWriter, 'add_scalar', record)
  return scalars


def test_wandb_receives_the_scalars_of_tensorboard(
  params, tmp_path, wandb_runs, tensorboard_scalars
):
  config = dataclasses.replace(SHORT, wandb='ours', eval_share=0.3)
  held_out = random_examples(9, seed=1)
  _, summary = fit(params, tmp_path, config, EXAMPLES, held_out=held_out)
  (run,) = wandb_runs
  sent = [(k, v, row['step']) for row in run.rows for k, v in row.items() if k != 'step']
  assert sent == tensorboard_scalars
  assert {name.split('/')[0] for name, _, _ in sent} == {'train', 'costs', 'held_out'}
  assert {step for _, _, step in sent} == set(range(1, summary['steps'] + 1))
  assert run.options['project'] == 'ours' and run.options['config']['batch_size'] == 8
  assert run.exit_codes == [0] and ('*', 'step') in run.metrics
  # A resumed run may disable it, and then nothing is sent.
  disabled = dataclasses.replace(config, wandb='')
  _, resumed = fit(params, tmp_path, disabled, EXAMPLES, held_out=held_out)
  assert resumed['resumed_at'] == summary['steps'] and len(wandb_runs) == 1


def test_a_resumed_run_is_the_same_run_at_wandb(params, tmp_path, wandb_runs, monkeypatch):
  config = dataclasses.replace(SHORT, wandb='ours')
  log_step, failures = TrainingLog.log_step, []

  def fail_once(self, step, metrics):
    if step == 4 and not failures:
      failures.append(step)
      raise RuntimeError('a crash')
    log_step(self, step, metrics)

  monkeypatch.setattr(TrainingLog, 'log_step', fail_once)
  with pytest.raises(RuntimeError, match='a crash'):
    fit(params, tmp_path / 'run', config, EXAMPLES)
  shutil.move(tmp_path / 'run', tmp_path / 'moved')
  _, summary = fit(params, tmp_path / 'moved', config, EXAMPLES)
  assert summary['resumed_at'] == 2
  (tmp_path / 'run').mkdir()
  with TrainingLog(tmp_path / 'run', 0, 1, 1, WORKLOAD, wandb='ours'):
    pass  # another run, in a folder of the same name
  first, resumed, other = wandb_runs
  assert first.exit_codes == [1] and resumed.exit_codes == [0]
  assert first.options['id'] == resumed.options['id'] != other.options['id']
  assert {run.options['resume'] for run in wandb_runs} == {'allow'}
  rows = [[row['step'] for row in run.rows if 'train/loss' in row] for run in (first, resumed)]
  assert rows == [[1, 2], list(range(3, summary['steps'] + 1))] and rows[1]


def test_only_process_0_writes(params, tmp_path, wandb_runs, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  with TrainingLog(tmp_path, 0, 1, 1, WORKLOAD, wandb='ours') as log:
    log.log_held_out(1, {'loss': 1.0})
  assert not wandb_runs and not list(tmp_path.iterdir())


@pytest.mark.parametrize('has_folder', [False, True])
def test_without_the_package_the_setting_is_refused(tmp_path, monkeypatch, has_folder):
  """A folder named wandb, as the package creates for its logs, is not the package."""
  monkeypatch.delitem(sys.modules, 'wandb', raising=False)
  if has_folder:
    (tmp_path / 'wandb').mkdir()
  monkeypatch.setattr(sys, 'path', [str(tmp_path)])
  with pytest.raises(UserError, match=r"train\.wandb='ours'.*pip install wandb"):
    TrainConfig(wandb='ours')
  assert TrainConfig().wandb == ''
