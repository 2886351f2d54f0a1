"""The processes of a run: joining them, waiting for them, failing together."""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from cai_jax.runtime.errors import UserError


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
      raise UserError(
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


def run_on_all_processes(name: str, work: Callable[[], Any]) -> Any:
  """Call `work` in every process and return its result once all of them have succeeded.

  If one process fails, the others finish their own work first, so it is kept, and then fail too.

  Args:
    name: what `work` does, as a verb phrase for the error message.
    work: called in each process.

  Raises:
    Exception: whatever `work` raises, with its traceback, in the process where it fails.
    UserError: in the other processes.
  """
  error, result = None, None
  try:
    result = work()
  except Exception as caught:
    error = caught
  if jax.process_count() > 1:
    succeeded = multihost_utils.process_allgather(np.array(error is None))
    if error is None and not succeeded.all():
      failed = ', '.join(map(str, np.flatnonzero(~succeeded)))
      raise UserError(f'process {failed} could not {name}; its own output says why.')
  if error is not None:
    raise error
  return result


def barrier(name: str) -> None:
  """Waits until all processes have come to the barrier of this name."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
