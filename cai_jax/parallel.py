"""Where arrays live: the device mesh, each parameter's sharding, start-up over many hosts."""

import math
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ('data', 'fsdp', 'tensor')
BATCH = P(('data', 'fsdp'))  # rows are split over both; parameters over `fsdp` and `tensor`

# Parameter path (as `path_str` writes it) → sharding. Exactly one rule matches each parameter.
RULES = (
  (r'(embed|head)/table', P('tensor', 'fsdp')),  # [V,D]
  (r'.*attention/(query|key|value)/kernel', P('fsdp', 'tensor', None)),  # [D,N,H]
  (r'.*attention/(query|key|value)/bias', P('tensor', None)),  # [N,H]
  (r'.*attention/output/kernel', P('tensor', None, 'fsdp')),  # [N,H,D]
  (r'.*attention/output/bias', P()),  # [D]
  (r'.*mlp/(gate|up)/kernel', P('fsdp', 'tensor')),  # [D,F]
  (r'.*mlp/down/kernel', P('tensor', 'fsdp')),  # [F,D]
  # Adapters: A [I,r] and B [r,O] lie as their kernel does, whose axes are merged.
  (r'.*(query|key|value|gate|up)/adapter/a', P('fsdp', None)),
  (r'.*(query|key|value|gate|up)/adapter/b', P(None, 'tensor')),
  (r'.*(output|down)/adapter/a', P('tensor', None)),
  (r'.*(output|down)/adapter/b', P(None, 'fsdp')),
  (r'(.*/)?(attention_norm|mlp_norm|norm|q_norm|k_norm)/scale', P()),  # [D] or [H]
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
  """A mesh over `devices` (all by default); one of the three sizes may be -1: the rest.

  Raises:
    ValueError: if the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [data, fsdp, tensor]
  given = math.prod(s for s in sizes if s != -1)
  if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes) or len(devices) % given:
    raise ValueError(
      f'mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fit {len(devices)} devices: sizes '
      'are positive, at most one is -1 (the rest), and their product divides the device count.'
    )
  sizes = [len(devices) // given if s == -1 else s for s in sizes]
  if math.prod(sizes) != len(devices):
    raise ValueError(
      f'mesh data={data}, fsdp={fsdp}, tensor={tensor} uses {math.prod(sizes)} of {len(devices)} '
      'devices; set one size to -1 to use the rest.'
    )
  return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def path_str(path) -> str:
  """'layers/0/mlp/up/kernel' for the key path of a leaf."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def spec_of(path: str) -> P:
  """The PartitionSpec of a parameter by its path.

  Raises:
    ValueError: if no rule matches, or more than one does.
  """
  matches = [spec for pattern, spec in RULES if re.fullmatch(pattern, path)]
  if len(matches) != 1:
    raise ValueError(
      f'{len(matches)} sharding rules match parameter {path!r}; parallel.RULES needs exactly one.'
    )
  return matches[0]


def param_shardings(params, mesh: Mesh):
  """NamedShardings of a parameter pytree (arrays or ShapeDtypeStructs), in its structure.

  Raises:
    ValueError: if an axis of the mesh does not divide the dimension that it splits.
  """

  def sharding(path, leaf):
    name = path_str(path)
    spec = spec_of(name)
    for size, axis in zip(leaf.shape, spec, strict=False):
      if axis is not None and size % mesh.shape[axis]:
        fits = [n for n in range(1, mesh.size + 1) if size % n == 0]
        raise ValueError(
          f'mesh axis {axis}={mesh.shape[axis]} does not divide dimension {size} of {name} '
          f'{leaf.shape}; {axis} may be one of {fits}.'
        )
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(sharding, params)


def localise(params, mesh: Mesh, dtype):
  """A copy of a parameter pytree on a mesh of this process's devices, in `dtype`.

  Parameters that lie on other hosts too go through this one's memory, all of them; then each
  process of the run must call it.
  """
  if jax.process_count() > 1:
    params = multihost_utils.process_allgather(params, tiled=True)
  shardings = param_shardings(params, mesh)
  return jax.tree.map(
    lambda x, sharding: jnp.array(jax.device_put(x, sharding), dtype, copy=True), params, shardings
  )


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
    raise ValueError(
      f'{name}={rows} is not divided by data × fsdp = {shards} of the mesh; use a multiple '
      f'of {shards}, such as {-(-rows // shards) * shards}.'
    )


def initialize() -> None:
  """Joins the other processes of the run, where the environment says that there are any.

  `COORDINATOR_ADDRESS`, `NUM_PROCESSES` and `PROCESS_ID` name them by hand. In a Slurm step
  (`srun`), under Open MPI (`mpirun`) and on TPU pods of GKE, JAX finds them by itself; it does so
  too where `COORDINATOR_ADDRESS=auto`, as is needed on TPU pods of Compute Engine, which set no
  variable.

  Raises:
    ValueError: if the address is given without the number of processes or this one's id.
  """
  address = os.environ.get('COORDINATOR_ADDRESS')
  if address is not None and address != 'auto':
    names = ('NUM_PROCESSES', 'PROCESS_ID')
    if wrong := [name for name in names if not os.environ.get(name, '').isdecimal()]:
      raise ValueError(
        f'COORDINATOR_ADDRESS={address} is set and {" and ".join(wrong)} is not, or is no number: '
        'each process needs all three.'
      )
    if jax.config.jax_platforms == 'cpu' or os.environ.get('JAX_PLATFORMS') == 'cpu':
      jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(address, *(int(os.environ[name]) for name in names))
  elif (
    address == 'auto'
    # Of the step: inside an allocation without srun there is SLURM_NTASKS, and one process only.
    or os.environ.get('SLURM_STEP_NUM_TASKS', '1') != '1'
    or os.environ.get('OMPI_COMM_WORLD_SIZE', '1') != '1'
    or ',' in os.environ.get('TPU_WORKER_HOSTNAMES', '')
  ):
    jax.distributed.initialize()


def place(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
  """`x`, which every process has, as one array: each gives its devices their part of it."""
  return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def together(name: str, work: Callable[[], Any]) -> Any:
  """The result of `work`, once all processes have theirs; where one fails, all end with an error.

  The others come to the end of their own work first: what they have done is kept.
  """
  error, result = None, None
  try:
    result = work()
  except (ValueError, OSError) as caught:
    error = caught
  if jax.process_count() > 1:
    well = multihost_utils.process_allgather(np.array(error is None))
    if error is None and not well.all():
      failed = ', '.join(map(str, np.flatnonzero(~well)))
      raise ValueError(f'process {failed} could not {name}; its own output says why.')
  if error is not None:
    raise error
  return result


def barrier(name: str) -> None:
  """Waits until all processes have come to the barrier of this name."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
