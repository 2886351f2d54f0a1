"""Replicas that are launches of their own.

The processes of a launch share one coordinator, and end when one of them is lost. If each replica
is a launch, with a coordinator of its own, the others sample on when one dies. The environment
variables CAI_JAX_REPLICA and CAI_JAX_NUM_REPLICAS tell a launch which replica it is. The launches
exchange no messages: shard s of D_CAI belongs to replica s mod CAI_JAX_NUM_REPLICAS, and replica 0
finishes the stage once the files of all shards are there.
"""

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from cai_jax.pipeline.models import sampling_mesh
from cai_jax.pipeline.run import Run
from cai_jax.pipeline.served_raters import find_served_rater
from cai_jax.runtime import interruption, lock, processes
from cai_jax.runtime.cloud import direct
from cai_jax.runtime.errors import StoppedError, UserError
from cai_jax.runtime.replicas import VARIABLES, launched_replica, replica_of

FOLDER = 'replicas'  # of the workdir, with the lock of each replica after the first
STAGE = 'generate'  # the only stage whose work is dealt to launches
START_SECONDS = 60.0  # for which replica 0 waits for another one to start
POLL_SECONDS = 0.5
STORE_POLL_SECONDS = 5.0


def check_launch(run: Run, stages: Sequence[str]) -> None:
  """Check that the work of a launch that is one of several replicas can be shared.

  Args:
    run: the run.
    stages: names of the stages to run.

  Raises:
    UserError: if it has a stage that cannot, models behind servers, or several replicas.
  """
  if launched_replica()[1] == 1:
    return
  if run.remotes or find_served_rater(run.config):
    raise UserError(
      f'{VARIABLES[1]} is set, but a server holds a model of this run. Servers take the '
      f'requests of all processes of one launch: start it without {" and ".join(VARIABLES)}.'
    )
  if list(stages) != [STAGE]:
    raise UserError(
      f'{VARIABLES[1]} is set, so that each replica is a launch of its own. Such launches share '
      f'only the stage {STAGE}. Give --stages={STAGE}, and then start the other stages as one '
      f'launch, without {" and ".join(VARIABLES)}.'
    )
  num_processes = jax.process_count()
  if len(replica_of(sampling_mesh(run)).processes) != num_processes:
    raise UserError(
      f'{VARIABLES[1]} is set, so that each launch is one replica, but the {num_processes} '
      'processes of this launch are several. Set mesh_sampling.processes=-1, or start a launch for '
      'each replica.'
    )


@contextlib.contextmanager
def hold_run(workdir: pathlib.Path) -> Iterator[None]:
  """Hold a workdir while the block runs; several launches share it if each is a replica.

  Args:
    workdir: the run's folder, or that of its journal.

  Raises:
    UserError: if another job holds it that does not share the work with this launch.
  """
  index, count = launched_replica()
  with lock.hold(_place(workdir, index), direct.is_private(workdir), replicas=count):
    # Each launch takes its own place first and looks at the others then, so two that cannot run
    # together do not miss each other.
    processes.run_on_process_0('look for replicas', lambda: _check_others(workdir, index, count))
    yield


def _place(workdir: pathlib.Path, index: int) -> pathlib.Path:
  """Return the folder that a replica holds."""
  return workdir / FOLDER / str(index) if index else workdir


def _find_owners(workdir: pathlib.Path) -> dict[int, dict[str, Any]]:
  """Return which jobs hold a workdir, by the number of the replica."""
  if (owners := direct.find_owners(workdir)) is not None:
    return owners
  numbers = [path.name for path in (workdir / FOLDER).glob('*') if path.name.isdecimal()]
  owners = {i: lock.find_owner(_place(workdir, i)) for i in sorted({0, *map(int, numbers)})}
  return {replica: owner for replica, owner in owners.items() if owner}


def _check_others(workdir: pathlib.Path, index: int, count: int) -> None:
  """Raise UserError if a replica of a launch of other replicas is running in a workdir."""
  for other, owner in _find_owners(workdir).items():
    if other != index and (owner.get('replicas', 1) != count or other >= count):
      raise UserError(
        f'{workdir} belongs to replica {other} of {owner.get("replicas", 1)}, '
        f'{lock.describe_owner(owner)}, and this launch is replica {index} of {count}. Wait until '
        'it ends, stop it, or choose another workdir.'
      )


def wait_for_replicas(workdir: pathlib.Path, find_missing: Callable[[], list[int]]) -> None:
  """Wait until the other replicas have written their shards. Process 0 of replica 0 calls this.

  Replica 0 has written its own shards, so it does not wait for those.

  Args:
    workdir: the run's folder.
    find_missing: returns the shards that are missing.

  Raises:
    StoppedError: if a replica with missing shards has ended, or does not start.
  """
  count = launched_replica()[1]
  seen: set[int] = set()
  start = time.monotonic()

  def look() -> list[int]:
    direct.fetch(workdir)
    return find_missing()

  while needed := {shard % count for shard in look()} - {0}:
    interruption.check()
    try:
      running = needed & _find_owners(workdir).keys()
    except UserError as error:  # the store is away
      raise StoppedError(f'{error} Then start the same command again to continue.') from error
    waited = time.monotonic() - start > START_SECONDS
    lost = {replica for replica in needed - running if waited or replica in seen}
    seen |= running
    # A replica may have written its last shard and ended since `needed` was found.
    if lost and (left := [shard for shard in look() if shard % count in lost]):
      names = ', '.join(map(str, sorted({shard % count for shard in left})))
      raise StoppedError(
        f'Replica {names} of {count} is not running, and {len(left)} of its shards are missing. '
        'All finished turns are kept. Start the same commands again to continue, or start one '
        f'launch without {" and ".join(VARIABLES)}, which samples what is missing.'
      )
    time.sleep(STORE_POLL_SECONDS if direct.is_private(workdir) else POLL_SECONDS)
