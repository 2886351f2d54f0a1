"""What 'auto' stands for in a run: it is resolved once, stored, and used again."""

import json
import types

import numpy as np
import pytest

from cai_jax import pipeline
from cai_jax.pipeline import device_defaults
from cai_jax.runtime.errors import UserError
from tests.pipeline_setup import small


@pytest.fixture
def run(random_model, tmp_path):
  config = small(random_model)
  config.train.dtype = 'bfloat16'
  return pipeline.build(config, tmp_path)


def use_gpu(monkeypatch):
  """Let runs have one device that this machine lacks."""
  device = types.SimpleNamespace(
    platform='gpu', device_kind='NVIDIA H200', compute_capability='9.0'
  )
  mesh = types.SimpleNamespace(devices=np.array([device], object))
  monkeypatch.setattr(device_defaults, 'global_mesh', lambda run: mesh)


def test_auto_becomes_a_kernel_in_all_settings_of_a_run(run, monkeypatch):
  assert run.config.train.attention == 'auto'
  use_gpu(monkeypatch)
  resolved = device_defaults.resolve_devices(run, {})
  assert resolved.config.train.attention == 'cudnn'
  assert resolved.values['train']['attention'] == 'cudnn'
  assert resolved.settings('train')['train']['attention'] == 'cudnn'
  assert run.values['train']['attention'] == 'auto'  # the run itself has not changed
  assert resolved.settings('generate') == run.settings('generate')
  line = device_defaults.describe_training(resolved)
  assert "'cudnn'" in line and 'other bits in each run' in line


@pytest.mark.parametrize('finished', [{}, {'finished': 'now'}])
def test_a_run_that_continues_keeps_its_kernel(run, monkeypatch, finished):
  """Runs of earlier versions, whose default was 'blocks', continue with it on any device."""
  use_gpu(monkeypatch)
  stages = {'train': {'settings': {'train': {'attention': 'blocks'}}, **finished}}
  resolved = device_defaults.resolve_devices(run, stages)
  assert resolved.values['train']['attention'] == 'blocks'
  assert device_defaults.describe_training(resolved) == "train.attention: 'blocks'"


def test_a_training_that_began_on_a_gpu_is_refused_elsewhere_until_it_has_finished(run):
  stages = {'train': {'settings': {'train': {'attention': 'cudnn'}}}}
  with pytest.raises(UserError, match="has begun elsewhere: attention 'cudnn' runs on GPUs only"):
    device_defaults.resolve_devices(run, stages)
  stages['train']['finished'] = 'now'
  assert device_defaults.resolve_devices(run, stages).config.train.attention == 'cudnn'


def test_the_kernel_is_printed_and_stored(random_model, tmp_path):
  lines = []
  run = pipeline.build(small(random_model), tmp_path)
  pipeline.run_stages(run, ['generate', 'train'], lines.append)
  assert "train.attention: 'blocks'" in lines
  stored = json.loads((tmp_path / 'config.json').read_text())
  assert stored['train']['attention'] == 'blocks'
  manifest = json.loads((tmp_path / 'manifest.json').read_text())
  assert manifest['stages']['train']['settings']['train']['attention'] == 'blocks'
  lines.clear()
  pipeline.run_stages(run, ['generate', 'train'], lines.append)  # as a new start with 'auto'
  assert lines[-2:] == ['generate: done before', 'train: done before']
