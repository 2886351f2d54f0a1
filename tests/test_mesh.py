"""The device mesh, batches on it, and joining the other processes of a run."""

import jax
import numpy as np
import pytest

from cai_jax.runtime import processes
from cai_jax.runtime.mesh import batch_sharding, check_batch, make_mesh


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


def test_batches():
  mesh = make_mesh(2, 2, 2)
  check_batch(8, mesh, 'train.batch_size')
  with pytest.raises(ValueError, match=r'train.batch_size=6 .* = 4 of the mesh.* such as 8'):
    check_batch(6, mesh, 'train.batch_size')
  rows = jax.device_put(np.arange(8.0).reshape(4, 2), batch_sharding(mesh))
  assert {shard.data.shape for shard in rows.addressable_shards} == {(1, 2)}


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
