"""Replicas: copies of the models that sample prompts of their own, each on one or more processes.

All processes of a replica run the same host program: the same chains, with the same journal, in the
same order. So they start the same device programs with the same arguments. After each burst, every
process asks the coordinator whether to stop. One process leads: it alone writes files. Where the
processes could decide differently, because they read a clock or a folder, the leader shares its
answer, or the decision is left out.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from traceback import format_exception
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from cai_jax.runtime import interruption, processes
from cai_jax.runtime.errors import SampledError, StoppedError, UserError
from cai_jax.runtime.mesh import is_split
from cai_jax.runtime.terminal import say

T = TypeVar('T')
# Set for replicas that are launches of their own.
VARIABLES = 'CAI_JAX_REPLICA', 'CAI_JAX_NUM_REPLICAS'
SHARE_SECONDS = 24 * 3600  # a leader that is lost ends the others long before
_FAILED = -1  # the number of a failure, beside those of signals
_shares = itertools.count()  # numbers the shared values; the same in all processes of a replica
_runs = itertools.count()  # numbers the uses of `LockStep`; the same in all of them, too


class ReplicaStopped(StoppedError):
  """An error of the leader, which all processes of a replica raise together."""


@dataclasses.dataclass(frozen=True)
class Replica:
  """A copy of the models, as its processes see it.

  Attributes:
    index: number of the replica, from 0.
    count: number of replicas.
    processes: indices of its processes in ascending order. The first one leads.
  """

  index: int = 0
  count: int = 1
  processes: tuple[int, ...] = (0,)

  @property
  def is_split(self) -> bool:
    """Whether the replica has several processes, which have to stay in lock step."""
    return len(self.processes) > 1

  @property
  def leads(self) -> bool:
    """Whether this process writes the files of the replica."""
    return not self.is_split or jax.process_index() == self.processes[0]

  def share(self, make: Callable[[], T]) -> T:
    """Return what `make` returns in the leader, in all processes of the replica.

    All of them call this together.

    Args:
      make: called in the leader. It returns a value of JSON types.

    Raises:
      Exception: in the leader, whatever `make` raises.
      ReplicaStopped: in the other processes, if it raises anything.
    """
    if not self.is_split:
      return make()
    client, key = _client(), f'cai_jax/replica/{self.index}/{next(_shares)}'
    if self.leads:
      try:
        value = make()
      except BaseException:
        client.key_value_set(key, json.dumps({'failed': True}))
        raise
      client.key_value_set(key, json.dumps({'value': value}))
      return value
    answer = json.loads(client.blocking_key_value_get(key, SHARE_SECONDS * 1000))
    if 'failed' in answer:
      raise self.leader_failed()
    return answer['value']

  def gather(self, value: T) -> list[T]:
    """Return the value of each process of the replica, in all of them, which call this together.

    Args:
      value: the value of this process, of JSON types.
    """
    if not self.is_split:
      return [value]
    client, key = _client(), f'cai_jax/replica/{self.index}/{next(_shares)}'
    client.key_value_set(f'{key}/{jax.process_index()}', json.dumps(value))
    names = [f'{key}/{process}' for process in self.processes]
    return [json.loads(client.blocking_key_value_get(x, SHARE_SECONDS * 1000)) for x in names]

  def leader_failed(self) -> 'ReplicaStopped':
    """Return what the other processes raise if the leader has failed."""
    return ReplicaStopped(
      f'Process {self.processes[0]} has failed. See the output of that process.'
    )


ALONE = Replica()


def replica_of(mesh: Mesh | None) -> Replica:
  """Return the replica of this process among those of this launch.

  Args:
    mesh: the mesh of the models, which has devices of this process; the meshes of all replicas have
      as many processes. None means that servers hold all models, and each process is a replica.
  """
  members = [jax.process_index()]
  if mesh is not None and is_split(mesh):
    members = sorted({device.process_index for device in mesh.devices.flat})
  index, count = members[0] // len(members), jax.process_count() // len(members)
  return Replica(index, count, tuple(members))


def find_replica(models: Iterable[Any]) -> Replica:
  """Return the replica of the models to which this process belongs, among those of all launches.

  Args:
    models: models that sample together. Those in memory have a `mesh`, the same for all.
  """
  meshes = (getattr(model, 'mesh', None) for model in models)
  replica = replica_of(next((mesh for mesh in meshes if mesh is not None), None))
  launch, launches = launched_replica()
  index, count = launch * replica.count + replica.index, launches * replica.count
  return dataclasses.replace(replica, index=index, count=count)


def launched_replica() -> tuple[int, int]:
  """Return which of how many launches this is, from the environment: (0, 1) if it is the only one.

  Raises:
    UserError: if the variables contradict each other.
  """
  given = {name: os.environ.get(name, '') for name in VARIABLES}
  if not any(given.values()):
    return 0, 1
  shown = ', '.join(f'{name}={value}' for name, value in given.items())
  if not all(value.isdecimal() for value in given.values()):
    raise UserError(f'{shown}: set both to numbers, or neither.')
  index, count = (int(value) for value in given.values())
  if not index < count:
    raise UserError(f'{shown}: {VARIABLES[0]} counts from 0, so it must be less than the other.')
  return index, count


def run_on_first_replica(name: str, replica: Replica, work: Callable[[], T]) -> T | None:
  """Call `work`, which runs programs of the models, in the first replica; other processes wait.

  Without several processes to a replica, this is `processes.run_on_process_0`.

  Args:
    name: what `work` does, as a verb phrase for the error message.
    replica: the replica of this process.
    work: called in all processes of the first replica of this launch.

  Returns:
    The result in the first replica, and None elsewhere.

  Raises:
    Exception: see `processes.run_on_all_processes`.
  """

  def run() -> T | None:
    if 0 not in replica.processes:
      return None
    with exit_alone(replica):
      return work()

  return processes.run_on_all_processes(name, run, alone=not replica.is_split)


@contextlib.contextmanager
def exit_alone(replica: Replica) -> Iterator[None]:
  """End this process at once if the block fails here and not in the rest of a split replica.

  The other processes would wait for this one in a program. They end when they lose it: its
  connections close, or the coordinator misses its heartbeats. Only `SampledError` and
  `ReplicaStopped` are raised in all processes alike. Any other error may be one of this process
  alone, such as a file that its host lacks.
  """
  try:
    yield
  except Exception as error:
    if not replica.is_split or isinstance(error, SampledError | ReplicaStopped):
      raise
    text = str(error) if isinstance(error, UserError) else ''.join(format_exception(error))
    say(f'process {jax.process_index()} has failed: {text.rstrip()}', file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


class LockStep:
  """Lets the processes of a replica stop at the same point. With one process, it does nothing.

  Args:
    replica: the replica.
  """

  def __init__(self, replica: Replica):
    self._replica = replica
    self._key = f'cai_jax/replica/{replica.index}/stop/{next(_runs)}' if replica.is_split else ''
    self._error: UserError | None = None
    self._step = 0

  def lead(self, work: Callable[[], object]) -> None:
    """Call `work`, which writes files, in the leader. Of an error, the next `check` tells all."""
    if not self._replica.is_split:
      work()
    elif self._replica.leads and self._error is None:
      try:
        work()
      except UserError as error:
        self._error = error

  def check(self) -> None:
    """Stop, at the same call in all processes, if one has received a signal or the leader failed.

    All processes call this after each burst. No process is more than one burst ahead of another,
    because a burst ends in all of them together.

    Raises:
      ReplicaStopped: in all processes, if `lead` has caught an error in the leader.
      Interrupted: in all processes, after a signal to one of them.
    """
    if not self._replica.is_split:
      return
    self._step += 1
    reason = _FAILED if self._error is not None else interruption.pending()
    number = interruption.stop_together(self._key, self._step, reason)
    if number == _FAILED:
      raise self._failure()
    if number:
      raise interruption.Interrupted(number)

  def finish(self) -> None:
    """Raise ReplicaStopped if `lead` has caught an error. All processes call this at the end."""
    if self._replica.is_split and self._replica.share(lambda: self._error is not None):
      raise self._failure()

  def _failure(self) -> 'ReplicaStopped':
    if self._error is not None:
      return ReplicaStopped(self._error)
    return self._replica.leader_failed()


def _client() -> Any:
  """Return the connection of this process to the coordinator."""
  from jax._src import distributed  # there is no public way to the key-value store

  return distributed.global_state.client
