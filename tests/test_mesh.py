"""The device mesh and batches on it."""

import jax
import numpy as np
import pytest

from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import batch_sharding, check_batch, make_mesh, rows_here, token_sharding


def test_mesh_defaults_put_every_device_on_data():
  assert len(jax.devices()) == 8
  sizes = lambda *args: tuple(make_mesh(*args).shape.values())  # noqa: E731
  assert tuple(make_mesh().shape) == ('data', 'fsdp', 'tensor', 'expert', 'sequence')
  assert sizes() == (8, 1, 1, 1, 1)
  assert sizes(2, -1) == (2, 4, 1, 1, 1)
  assert sizes(1, 2, -1) == (1, 2, 4, 1, 1)
  assert make_mesh(2, sequence=-1).shape['sequence'] == 4
  assert make_mesh(devices=jax.devices()[:3]).shape['data'] == 3


@pytest.mark.parametrize(
  'sizes', [(3, 1, 1), (-1, -1, 1), (0, 1, 1), (-1, 3, 1), (2, 2, 1), (16, 1, 1), (-2, 1, 1)]
)
def test_mesh_that_does_not_fit_the_devices_is_refused(sizes):
  data, fsdp, tensor = sizes
  with pytest.raises(UserError, match=f'data={data}, fsdp={fsdp}, tensor={tensor}'):
    make_mesh(*sizes)


def test_batch_divides_over_data_and_fsdp():
  mesh = make_mesh(2, 2, 2)
  check_batch(8, mesh, 'train.batch_size')
  with pytest.raises(UserError, match=r'train.batch_size=6 .* = 4 of the mesh.* such as 8'):
    check_batch(6, mesh, 'train.batch_size')
  rows = jax.device_put(np.arange(8.0).reshape(4, 2), batch_sharding(mesh))
  assert {shard.data.shape for shard in rows.addressable_shards} == {(1, 2)}


def test_the_rows_of_a_process_are_those_of_its_devices():
  mesh = make_mesh(1, 1, devices=jax.devices()[:1])
  assert rows_here((6, 8), token_sharding(mesh)) == set(range(6))


def test_a_process_has_rows_of_its_devices_only(monkeypatch):
  sharding = token_sharding(make_mesh(4, 1, devices=jax.devices()[:4]))
  every = sharding.devices_indices_map((8, 2))
  mine = dict(list(every.items())[1:3])
  kind = type(sharding)
  monkeypatch.setattr(kind, 'addressable_devices_indices_map', lambda self, shape: mine)
  assert rows_here((8, 2), sharding) == {2, 3, 4, 5}
