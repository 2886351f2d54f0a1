"""Where parameters lie: each sharding rule, the mesh, and what does not divide."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from cai_jax.model import config as config_lib
from cai_jax.model import lora, sharding
from cai_jax.model.sharding import RULES, flatten_params, param_shardings, partition_spec, path_str
from cai_jax.model.transformer import abstract_model
from cai_jax.runtime import processes
from cai_jax.runtime.mesh import batch_sharding, check_batch, make_mesh

BASE = dict(
  vocab_size=8, d_model=16, d_ff=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4
)
CONFIGS = [
  config_lib.ModelConfig('llama', **BASE, max_positions=64, qkv_bias=True, output_bias=True),
  config_lib.ModelConfig('qwen3', **BASE, max_positions=64, qk_norm=True, tied_embeddings=True),
]


def paths(config):
  return [path for path, _ in flatten_params(abstract_model(config)[1]).items()]


def test_every_rule_is_used_and_every_parameter_has_one():
  adapted = lora.abstract_model(CONFIGS[0], lora.LoraConfig(2, 16.0, 'attention/|mlp/'))[1]
  names = {path for config in CONFIGS for path in paths(config)}
  names |= {path for path, _ in flatten_params(adapted).items()}
  for path in names:
    assert isinstance(partition_spec(path), P)  # raises unless exactly one rule matches
  for pattern, _ in RULES:
    assert any(re.fullmatch(pattern, path) for path in names), f'no parameter matches {pattern}'


@pytest.mark.parametrize('config', CONFIGS, ids=lambda c: c.family)
def test_specs_have_the_rank_of_their_parameter(config):
  for path, leaf in flatten_params(abstract_model(config)[1]).items():
    spec = partition_spec(path)
    assert len(spec) in (0, leaf.ndim), path
    if leaf.ndim > 1 and path.endswith(('kernel', 'table')):  # the large ones are split both ways
      assert {axis for axis in spec if axis} == {'fsdp', 'tensor'}


def test_a_parameter_without_a_rule(monkeypatch):
  with pytest.raises(ValueError, match="0 sharding rules match parameter 'layers/0/moe/kernel'"):
    partition_spec('layers/0/moe/kernel')
  monkeypatch.setattr(sharding, 'RULES', (*RULES, (r'norm/.*', P())))
  with pytest.raises(ValueError, match="2 sharding rules match parameter 'norm/scale'"):
    partition_spec('norm/scale')


def test_mesh_defaults_put_every_device_on_data():
  assert len(jax.devices()) == 8
  assert make_mesh().shape == {'data': 8, 'fsdp': 1, 'tensor': 1}
  assert make_mesh(2, -1).shape == {'data': 2, 'fsdp': 4, 'tensor': 1}
  assert make_mesh(1, 2, -1).shape == {'data': 1, 'fsdp': 2, 'tensor': 4}
  assert make_mesh(devices=jax.devices()[:3]).shape['data'] == 3


@pytest.mark.parametrize(
  'sizes', [(3, 1, 1), (-1, -1, 1), (0, 1, 1), (-1, 3, 1), (2, 2, 1), (16, 1, 1), (-2, 1, 1)]
)
def test_meshes_that_do_not_fit(sizes):
  data, fsdp, tensor = sizes
  with pytest.raises(ValueError, match=f'data={data}, fsdp={fsdp}, tensor={tensor}'):
    make_mesh(*sizes)


def test_a_dimension_that_the_mesh_does_not_divide():
  params = abstract_model(CONFIGS[0])[1]
  with pytest.raises(ValueError, match=r'tensor=4 does not divide dimension 2 of .*key.*\[1, 2\]'):
    param_shardings(params, make_mesh(2, 1, 4))
  shardings = param_shardings(params, make_mesh(1, 4, 2))
  kernel = shardings['layers'][1]['attention']['query']['kernel']
  assert kernel.shard_shape((16, 4, 4)) == (4, 2, 4)
  assert jax.tree.structure(shardings) == jax.tree.structure(params)


def test_batches():
  mesh = make_mesh(2, 2, 2)
  check_batch(8, mesh, 'train.batch_size')
  with pytest.raises(ValueError, match=r'train.batch_size=6 .* = 4 of the mesh.* such as 8'):
    check_batch(6, mesh, 'train.batch_size')
  rows = jax.device_put(np.arange(8.0).reshape(4, 2), batch_sharding(mesh))
  assert {shard.data.shape for shard in rows.addressable_shards} == {(1, 2)}


def test_path_str_of_dicts_lists_and_attributes():
  tree = {'a': [1, {'b': 2}]}
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  assert [path_str(path) for path, _ in leaves] == ['a/0', 'a/1/b']


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
def test_who_joins_other_processes(monkeypatch, environment, joins):
  calls = []
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *args: calls.append(args))
  monkeypatch.setattr(jax.config, 'update', lambda *_: None)
  _set(monkeypatch, environment)
  processes.initialize()
  assert calls == ([] if joins is None else [joins])


def test_an_address_without_the_rest(monkeypatch):
  _set(monkeypatch, {'COORDINATOR_ADDRESS': 'a:1', 'NUM_PROCESSES': '2'})
  with pytest.raises(ValueError, match='COORDINATOR_ADDRESS=a:1 is set, but PROCESS_ID is missing'):
    processes.initialize()


def _set(monkeypatch, environment):
  for name in (
    *('COORDINATOR_ADDRESS', 'NUM_PROCESSES', 'PROCESS_ID', 'SLURM_NTASKS'),
    *('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE', 'TPU_WORKER_HOSTNAMES'),
  ):
    monkeypatch.delenv(name, raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
