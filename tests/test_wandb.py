"""Weights & Biases: it gets TensorBoard's scalars, one run however often resumed; or an error."""

import dataclasses
import importlib.machinery
import shutil
import sys
import types

import jax
import numpy as np
import pytest
from tensorboardX import SummaryWriter

from cai_jax.model.transformer import init_params
from cai_jax.training import log, loop
from cai_jax.training.config import TrainConfig
from tests.test_watch import CONFIG, MODEL, examples, fit

SHORT = dataclasses.replace(CONFIG, epochs=2, checkpoint_every=2)
ITEMS = examples(30)
WORK = log.Work(np.zeros(1), np.zeros(1), None, lambda step: [])


@pytest.fixture(scope='module')
def params():
  return init_params(MODEL, jax.random.key(0))


@pytest.fixture
def runs(monkeypatch):
  """A package `wandb` that is not the real one, and what was asked of it, run by run."""
  runs = []

  def init(**options):
    run = types.SimpleNamespace(options=options, rows=[], metrics=[], ended=[])
    run.log = run.rows.append
    run.define_metric = lambda name, step_metric=None: run.metrics.append((name, step_metric))
    run.finish = lambda exit_code: run.ended.append(exit_code)
    runs.append(run)
    return run

  package = types.ModuleType('wandb')
  package.init = init
  package.__spec__ = importlib.machinery.ModuleSpec('wandb', None, origin='wandb/__init__.py')
  monkeypatch.setitem(sys.modules, 'wandb', package)
  return runs


@pytest.fixture
def scalars(monkeypatch):
  """What TensorBoard was given: (name, value, step)."""
  found = []
  write = SummaryWriter.add_scalar

  def add(self, name, value, step):
    found.append((name, value, step))
    write(self, name, value, step)

  monkeypatch.setattr(SummaryWriter, 'add_scalar', add)
  return found


def test_it_gets_the_scalars_of_tensorboard(params, tmp_path, runs, scalars):
  config = dataclasses.replace(SHORT, wandb='ours', eval_share=0.3)
  _, summary = fit(params, tmp_path, config, loop.Watch(examples(9, seed=1)), ITEMS)
  (run,) = runs
  sent = [(k, v, row['step']) for row in run.rows for k, v in row.items() if k != 'step']
  assert sent == scalars
  assert {name.split('/')[0] for name, _, _ in sent} == {'train', 'costs', 'held_out'}
  assert {step for _, _, step in sent} == set(range(1, summary['steps'] + 1))
  assert run.options['project'] == 'ours' and run.options['config']['batch_size'] == 8
  assert run.ended == [0] and ('*', 'step') in run.metrics
  # It may be turned off on the way, and then nothing is sent.
  off = dataclasses.replace(config, wandb='')
  _, found = fit(params, tmp_path, off, loop.Watch(examples(9, seed=1)), ITEMS)
  assert found['resumed_at'] == summary['steps'] and len(runs) == 1


def test_a_resumed_run_is_the_same_run(params, tmp_path, runs, monkeypatch):
  config = dataclasses.replace(SHORT, wandb='ours')
  add, broken = log.Log.add, []

  def fail(self, step, metrics):
    if step == 3 and not broken:
      broken.append(step)
      raise RuntimeError('a crash')
    add(self, step, metrics)

  monkeypatch.setattr(log.Log, 'add', fail)
  with pytest.raises(RuntimeError, match='a crash'):
    fit(params, tmp_path / 'run', config, items=ITEMS)
  shutil.move(tmp_path / 'run', tmp_path / 'moved')
  _, summary = fit(params, tmp_path / 'moved', config, items=ITEMS)
  assert summary['resumed_at'] == 2
  (tmp_path / 'run').mkdir()
  with log.Log(tmp_path / 'run', 0, 1, 1, WORK, wandb='ours'):
    pass  # another one, where the first was
  first, resumed, other = runs
  assert first.ended == [1] and resumed.ended == [0]
  assert first.options['id'] == resumed.options['id'] != other.options['id']
  assert {run.options['resume'] for run in runs} == {'allow'}
  rows = [[row['step'] for row in run.rows if 'train/loss' in row] for run in (first, resumed)]
  assert rows == [[1, 2], list(range(3, summary['steps'] + 1))] and rows[1]


def test_only_process_0_sends(params, tmp_path, runs, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  with log.Log(tmp_path, 0, 1, 1, WORK, wandb='ours') as quiet:
    quiet.held_out(1, {'loss': 1.0})
  assert not runs and not list(tmp_path.iterdir())


@pytest.mark.parametrize('folder', [False, True])
def test_without_the_package_it_is_an_error(tmp_path, monkeypatch, folder):
  """A folder of logs that is called wandb, as it makes one, is no package."""
  monkeypatch.delitem(sys.modules, 'wandb', raising=False)
  if folder:
    (tmp_path / 'wandb').mkdir()
  monkeypatch.setattr(sys, 'path', [str(tmp_path)])
  with pytest.raises(ValueError, match=r"train\.wandb='ours'.*pip install wandb"):
    TrainConfig(wandb='ours')
  assert TrainConfig().wandb == ''
