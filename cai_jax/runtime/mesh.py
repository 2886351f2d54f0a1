"""The device mesh and the sharding of batches over it."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cai_jax.runtime.errors import UserError

T = TypeVar('T')

AXES = ('data', 'fsdp', 'tensor', 'expert', 'sequence')
BATCH = P(('data', 'fsdp'))  # the rows of a batch
TOKENS = P(('data', 'fsdp'), 'sequence')  # the rows of a training batch, and the tokens of each row
SHARDS = ('fsdp', 'sequence')  # split parameters; devices along both axes hold different tokens
HEADS = ('tensor', 'sequence')  # split the heads where attention needs all tokens of a row


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  devices: Sequence[jax.Device] | None = None,
  expert: int = 1,
  sequence: int = 1,
) -> Mesh:
  """Return a mesh with the axes of `AXES`.

  At most one of the sizes may be -1, which takes all remaining devices.

  Args:
    data: number of devices along the axis that splits the batch and replicates the parameters.
    fsdp: number of devices along the axis that splits both the batch and the parameters.
    tensor: number of devices along the axis that splits only the parameters.
    devices: devices of the mesh; None means all devices of all processes.
    expert: number of devices along the axis that splits only the experts of a mixture of experts.
    sequence: number of devices along the axis that splits the tokens of each row in training, and
      the parameters.

  Raises:
    UserError: if the product of the sizes is not the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [data, fsdp, tensor, expert, sequence]
  named = f'mesh data={data}, fsdp={fsdp}, tensor={tensor}'
  named += f', expert={expert}' if expert != 1 else ''
  named += f', sequence={sequence}' if sequence != 1 else ''
  product = math.prod(size for size in sizes if size != -1)
  if (
    sizes.count(-1) > 1
    or any(size < 1 and size != -1 for size in sizes)
    or len(devices) % product != 0
  ):
    raise UserError(
      f'{named} does not fit {len(devices)} devices. Each size must be positive, '
      'at most one may be -1 (all remaining devices), and their product must divide the number '
      'of devices.'
    )
  sizes = [len(devices) // product if size == -1 else size for size in sizes]
  if math.prod(sizes) != len(devices):
    raise UserError(
      f'{named} uses {math.prod(sizes)} of {len(devices)} '
      'devices. Set one size to -1 to use the remaining devices.'
    )
  return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def join_sequence(sizes: Mapping[str, int]) -> dict[str, int]:
  """Return the sizes of a mesh whose devices along `sequence` are along `data` instead.

  Args:
    sizes: the size of each axis; one may be -1.
  """
  data, sequence = sizes['data'], sizes['sequence']
  sizes = {**sizes, 'sequence': 1}
  if -1 in (data, sequence):
    return sizes | {'data': -1}
  return sizes | {'data': data * sequence}


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Return the sharding of arrays whose first axis is the batch."""
  return NamedSharding(mesh, BATCH)


def token_sharding(mesh: Mesh) -> NamedSharding:
  """Return the sharding of arrays [B,T,...] of training batches: rows, and tokens of each row."""
  return NamedSharding(mesh, TOKENS)


def batch_shards(mesh: Mesh) -> int:
  """Return the number of shards of a batch."""
  return mesh.shape['data'] * mesh.shape['fsdp']


@functools.cache
def is_split(mesh: Mesh) -> bool:
  """Return whether a mesh has devices of several processes."""
  return len({device.process_index for device in mesh.devices.flat}) > 1


def replicate(tree: T, mesh: Mesh) -> T:
  """Return a pytree of arrays that this process can read as a whole.

  Args:
    tree: arrays on the mesh. All processes of the mesh call this together.
    mesh: their mesh. If it has devices of this process only, the arrays stay as they are.
  """
  if not is_split(mesh):
    return tree
  return _replication(mesh)(tree)


@functools.cache
def _replication(mesh: Mesh) -> Callable[[T], T]:
  """Return the program of `replicate`, one for each mesh, so that it compiles once."""
  return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))


def check_batch(num_rows: int, mesh: Mesh, field: str) -> None:
  """Check that the rows of a batch divide evenly over the batch axes of a mesh.

  Args:
    num_rows: rows of the batch.
    mesh: the device mesh.
    field: config field that sets the number of rows, for the error message.

  Raises:
    UserError: if the rows do not divide evenly.
  """
  shards = batch_shards(mesh)
  if num_rows % shards:
    raise UserError(
      f'{field}={num_rows} is not a multiple of data × fsdp = {shards} of the mesh. Use a multiple '
      f'of {shards}, such as {-(-num_rows // shards) * shards}.'
    )


def place(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
  """Return a host array as a global array with the given sharding.

  Args:
    x: the array, the same in every process. Each process copies the parts for its own devices.
    sharding: sharding of the result.
  """
  return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def rows_here(shape: tuple[int, ...], sharding: NamedSharding) -> set[int]:
  """Return the rows of a global array that `place` reads in this process.

  Args:
    shape: shape of the array.
    sharding: its sharding.
  """
  indices = sharding.addressable_devices_indices_map(shape).values()
  return {row for index in indices if index for row in range(shape[0])[index[0]]}


def to_host(x: jax.Array) -> np.ndarray:
  """Return a global array as a NumPy array, with the shards of all processes.

  If other processes hold shards, every process must call this function.

  Args:
    x: a global array.
  """
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    return multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x)
