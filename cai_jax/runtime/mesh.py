"""Where arrays live: the device mesh, each parameter's sharding, start-up over many hosts."""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cai_jax.runtime.errors import UserError

AXES = ('data', 'fsdp', 'tensor')
BATCH = P(('data', 'fsdp'))  # rows are split over both; parameters over `fsdp` and `tensor`


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
  """A mesh over `devices` (all by default); one of the three sizes may be -1: the rest.

  Raises:
    ValueError: if the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [data, fsdp, tensor]
  given = math.prod(s for s in sizes if s != -1)
  if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes) or len(devices) % given:
    raise UserError(
      f'mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fit {len(devices)} devices: sizes '
      'are positive, at most one is -1 (the rest), and their product divides the device count.'
    )
  sizes = [len(devices) // given if s == -1 else s for s in sizes]
  if math.prod(sizes) != len(devices):
    raise UserError(
      f'mesh data={data}, fsdp={fsdp}, tensor={tensor} uses {math.prod(sizes)} of {len(devices)} '
      'devices; set one size to -1 to use the rest.'
    )
  return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Sharding of arrays whose first axis is the batch."""
  return NamedSharding(mesh, BATCH)


def batch_shards(mesh: Mesh) -> int:
  """Parts that the rows of a batch are split into."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def check_batch(rows: int, mesh: Mesh, name: str) -> None:
  """ValueError unless `rows` split evenly over the batch axes; `name` is the config field."""
  shards = batch_shards(mesh)
  if rows % shards:
    raise UserError(
      f'{name}={rows} is not divided by data × fsdp = {shards} of the mesh; use a multiple '
      f'of {shards}, such as {-(-rows // shards) * shards}.'
    )


def place(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
  """`x`, which every process has, as one array: each gives its devices their part of it."""
  return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
