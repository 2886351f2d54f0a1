"""M_aligned goes from the mesh of training to that of sampling in memory, or through its files."""

import dataclasses
import re

import jax
import numpy as np
import pytest

import cai_jax
from cai_jax.model import lm as models
from cai_jax.model.sharding import param_shardings, reshard
from cai_jax.pipeline import build, kept_models, run_stages
from cai_jax.runtime.hardware import Device
from cai_jax.runtime.mesh import make_mesh
from tests.feedback_setup import make_lm
from tests.pipeline_setup import set_fields, small


def test_resharded_parameters_have_the_bits_of_the_files(tiny_tokenizer, tmp_path):
  """From f32 over fsdp, through the bf16 of the files, to f32 over data and tensor."""
  lm, training = make_lm(tiny_tokenizer), make_mesh(1, -1)
  lm = dataclasses.replace(
    lm, params=jax.device_put(lm.params, param_shardings(lm.params, training)), mesh=training
  )
  cai_jax.save(lm, tmp_path, 'bfloat16')
  sampling = make_mesh(-1, tensor=2)
  params = reshard(lm.params, sampling, ('bfloat16', 'float32'))
  read = models.load(tmp_path, 'float32', sampling)
  kept = models.load(tmp_path, 'float32', sampling, params=params)
  assert kept.fingerprint == read.fingerprint
  same = jax.tree.map(
    lambda a, b: np.array_equal(a, b) and a.sharding == b.sharding, params, read.params
  )
  assert all(jax.tree.leaves(same)) and kept.params is params
  assert not np.array_equal(lm.params['embed']['table'], params['embed']['table'])  # it was rounded


@pytest.mark.parametrize(
  ('missing', 'fields', 'memory', 'line'),
  [
    (('generate', 'evaluate'), {}, 2**40, ''),
    (('train', 'evaluate'), {}, 2**40, 'stays in device memory'),
    (('train', 'prefer', 'evaluate'), {}, 2**40, 'because stage prefer needs the memory'),
    (('train', 'evaluate'), {'model__weights': 'int8'}, 2**40, 'because kernels are quantized'),
    (
      ('train', 'evaluate'),
      {'engine__cache_gib': 2.0},
      2**30,
      r'a copy takes 0.0 GiB of each device, more than half',
    ),
  ],
)
def test_where_aligned_stays_is_decided_before_the_run(
  random_model, tmp_path, monkeypatch, missing, fields, memory, line
):
  config = small(random_model)
  set_fields(**{'engine__page_tokens': 16, 'engine__cache_gib': 1.0} | fields)(config)
  device = Device('cpu', 'cpu', memory)
  monkeypatch.setattr(kept_models, 'describe_device', lambda _: device)
  run = build(config, tmp_path)
  said = kept_models.plan_handover(run, missing)
  assert run.kept.wanted == ('stays' in line)
  assert re.search(line, said) if line else not said


@pytest.mark.slow
def test_answers_of_kept_parameters_are_those_of_the_files(random_model, tmp_path, monkeypatch):
  """Training splits the parameters over eight devices, sampling over two."""
  config = small(random_model)
  set_fields(mesh__data=1, mesh__fsdp=8, mesh_sampling__data=4, mesh_sampling__tensor=2)(config)
  loads = []
  monkeypatch.setattr(
    models,
    'load_params',
    lambda *args, load=models.load_params, **names: loads.append(args[0]) or load(*args, **names),
  )
  for name in ('kept', 'read'):
    if name == 'read':
      monkeypatch.setattr(kept_models, '_reason_against', lambda *_: 'of the test')
    lines = []
    run_stages(build(config, tmp_path / name), ['generate', 'train', 'evaluate'], lines.append)
    assert any(line.startswith('M_aligned: ') for line in lines)
  assert loads.count(tmp_path / 'kept' / 'model') == 0
  assert loads.count(tmp_path / 'read' / 'model') == 1
  rows = [(tmp_path / name / 'evaluation' / 'rows.jsonl').read_bytes() for name in ('kept', 'read')]
  assert rows[0] == rows[1]
