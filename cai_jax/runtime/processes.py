"""The processes of a run: how they connect, wait for each other, and fail together."""

import contextlib
import os
import re
import socket
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from cai_jax.runtime import interruption
from cai_jax.runtime.errors import StoppedError, UserError
from cai_jax.runtime.interruption import Interrupted
from cai_jax.runtime.terminal import say

T = TypeVar('T')


class Exchange(Protocol):
  """How processes that share no folder see the files of each other."""

  def send(self) -> bool:
    """Give the others what this process has written; return whether that was anything."""
    ...

  def receive(self) -> None:
    """Get what the others have written."""
    ...


_exchanges: list[Exchange] = []  # at most one; none if the processes share the folder of the run
_SUCCESS, _REFUSED, _FAILED = range(3)  # how a process's share of some work ended; see `_outcome`


def initialize() -> None:
  """Connect to the other processes of the run, if the environment declares any.

  JAX detects Slurm steps (`srun`), Open MPI (`mpirun`) and TPU pods of GKE by itself. Elsewhere set
  `COORDINATOR_ADDRESS` (host:port of process 0), `NUM_PROCESSES` and `PROCESS_ID` in each process;
  each process then uses all devices that it sees. On TPU pods of Compute Engine, set
  `COORDINATOR_ADDRESS=auto`.

  Raises:
    UserError: if the address is set, but the number of processes or the process id is not.
  """
  jax.config.update('jax_enable_preemption_service', False)  # `interruption` handles SIGTERM
  address = os.environ.get('COORDINATOR_ADDRESS')
  if address is not None and address != 'auto':
    names = ('NUM_PROCESSES', 'PROCESS_ID')
    if missing := [name for name in names if not os.environ.get(name, '').isdecimal()]:
      raise UserError(
        f'COORDINATOR_ADDRESS={address} is set, but {" and ".join(missing)} is missing or not a '
        'number. Set all three variables in each process.'
      )
    if (
      jax.config.jax_platforms == 'cpu'  # type: ignore[attr-defined]
      or os.environ.get('JAX_PLATFORMS') == 'cpu'
    ):
      jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    num_processes, process_id = (int(os.environ[name]) for name in names)
    # With detection, JAX would keep one GPU for each process in an allocation of Slurm.
    jax.distributed.initialize(
      address, num_processes, process_id, cluster_detection_method='deactivate'
    )
    interruption.join_processes()
  elif (
    address == 'auto'
    # Not SLURM_NTASKS: an allocation without srun sets it too, and runs a single process.
    or os.environ.get('SLURM_STEP_NUM_TASKS', '1') != '1'
    or os.environ.get('OMPI_COMM_WORLD_SIZE', '1') != '1'
    or ',' in os.environ.get('TPU_WORKER_HOSTNAMES', '')
  ):
    jax.distributed.initialize(local_device_ids=_slurm_gpus())
    interruption.join_processes()


def _slurm_gpus() -> list[int] | None:
  """Return all GPUs of the node if Slurm starts one process on each node, otherwise None.

  With None, JAX gives each process one GPU: the one with the number of the process on its node.
  """
  tasks = os.environ.get('SLURM_STEP_TASKS_PER_NODE', '')  # such as '1(x2)' on two nodes
  gpus = os.environ.get('SLURM_GPUS_ON_NODE', '')
  if re.fullmatch(r'1(\(x\d+\))?', tasks) and gpus.isdecimal():
    return list(range(int(gpus)))
  return None


def run_on_all_processes(name: str, work: Callable[[], T], alone: bool = True) -> T:
  """Call `work` in every process and return its result once all of them have succeeded.

  If one process fails, the others first finish and keep their own work, and then fail too. With
  several processes, the one that fails prints its error at once, because the others may take hours.
  Afterwards, each process sees the files that the others have written, see `exchanging`.

  Args:
    name: what `work` does, as a verb phrase for the error message.
    work: called in each process.
    alone: whether `work` has no collective operations, so that a signal may interrupt it anywhere.
      Other work marks its parts with `interruption.local_work`.

  Returns:
    This process's result.

  Raises:
    Exception: whatever `work` raises, with its traceback, in the process where it fails.
    UserError: in the other processes. It is a StoppedError unless every failed process raised a
      plain UserError, before it did any work.
    Interrupted: in every process, if one of them has received a signal and does not defer it.
  """

  def work_and_send() -> tuple[T, bool]:
    return work(), bool(_exchanges) and _exchanges[0].send()

  def receive() -> tuple[None, bool]:
    _exchanges[0].receive()
    return None, False

  result, is_sent = _run_together(name, work_and_send, alone)
  if is_sent:
    _run_together('fetch the files of other processes', receive)
  return result


def _run_together(
  name: str, work: Callable[[], tuple[T, bool]], alone: bool = True
) -> tuple[T, bool]:
  """Call `work` in every process; see `run_on_all_processes`.

  Args:
    name: what `work` does.
    work: called in each process; returns a result, and a flag.
    alone: as for `run_on_all_processes`.

  Returns:
    This process's result, and whether the flag of any process is set.
  """
  error: Exception | Interrupted | None = None
  flag = False
  try:
    with interruption.local_work() if alone else contextlib.nullcontext():
      result, flag = work()
  except (Exception, Interrupted) as caught:
    error = caught
    if jax.process_count() > 1 and not isinstance(error, Interrupted):
      _print_error(name, error)
  if jax.process_count() > 1:
    outcomes, flags = multihost_utils.process_allgather(np.array([_outcome(error), flag])).T
    if outcomes.max() > _FAILED:
      raise Interrupted(int(outcomes.max()) - _FAILED)
    if error is None and outcomes.any():
      failed = ', '.join(map(str, np.flatnonzero(outcomes)))
      kind = StoppedError if (outcomes == _FAILED).any() else UserError
      raise kind(f'Process {failed} could not {name}. See the output of that process.')
    flag = bool(flags.any())
  if error is not None:
    raise error
  return result, flag


@contextlib.contextmanager
def exchanging(exchange: Exchange) -> Iterator[None]:
  """Let processes without a common folder see the files of each other while the block runs.

  Files are exchanged at the end of each `run_on_all_processes`, and so of what is made of it.

  Args:
    exchange: sends and receives the files of this process.
  """
  _exchanges.append(exchange)
  try:
    yield
  finally:
    _exchanges.remove(exchange)


def _print_error(name: str, error: Exception) -> None:
  """Print an error to stderr: one line if the user can fix it, and else the traceback."""
  text = f'process {jax.process_index()} could not {name}: {error}\n'
  if not isinstance(error, UserError):
    text += ''.join(traceback.format_exception(error))
  say(text.rstrip(), file=sys.stderr)


def _outcome(error: BaseException | None) -> int:
  """Return how work ended, as a number: `_FAILED` plus the signal's if one interrupted it."""
  if isinstance(error, Interrupted) or (error is None and interruption.pending()):
    return _FAILED + (error.number if isinstance(error, Interrupted) else interruption.pending())
  if error is None:
    return _SUCCESS
  refused = isinstance(error, UserError) and not isinstance(error, StoppedError)
  return _REFUSED if refused else _FAILED


def run_on_process_0(name: str, work: Callable[[], T]) -> T | None:
  """Call `work` in process 0 only; the other processes wait, and fail if it fails.

  Args:
    name: what `work` does, as a verb phrase for the error message.
    work: called in process 0.

  Returns:
    The result in process 0, and None in the other processes.

  Raises:
    Exception: see `run_on_all_processes`.
  """
  return run_on_all_processes(name, lambda: work() if jax.process_index() == 0 else None)


def barrier(name: str) -> None:
  """Wait until all processes have reached the barrier of this name, and see each other's files.

  Raises:
    Interrupted: in every process, if one of them has received a signal and does not defer it.
  """
  run_on_all_processes(name, lambda: None)


def is_same_everywhere(text: str) -> bool:
  """Return whether a text is the same in all processes of the run, which call this together.

  Args:
    text: the text.
  """
  if jax.process_count() == 1:
    return True
  digests = multihost_utils.process_allgather(np.array(zlib.crc32(text.encode()), np.uint32))
  return bool((digests == digests[0]).all())


def count_on_this_host() -> int:
  """Return the number of processes of the run on this host. All processes call it together."""
  if jax.process_count() == 1:
    return 1
  name = np.array(zlib.crc32(socket.gethostname().encode()), np.uint32)
  return int((multihost_utils.process_allgather(name) == name).sum())
