"""The shards of D_CAI in a folder: whose they are, which are missing, and who samples them."""

import os
import pathlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from cai_jax.data import d_cai
from cai_jax.data.ended import read_ended
from cai_jax.feedback.job import Job
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import make_folder, read_json, write_json
from cai_jax.runtime.processes import run_on_process_0
from cai_jax.runtime.replicas import Replica, exit_alone, launched_replica
from cai_jax.runtime.terminal import say

JOB_FILE = 'job.json'  # names the job whose shards a folder holds


def count_shards(job: Job) -> int:
  """Return the number of shards of a job."""
  return -(-len(job.prompts) // job.config.shard_rows)


def find_unwritten(folder: str | os.PathLike, job: Job, valid: set[int]) -> list[int]:
  """Return the shards of a job that a folder does not have, or that are damaged.

  Args:
    folder: the folder of the dataset.
    job: the job.
    valid: shards that earlier calls have read, and that are not read again. Those that this call
      finds valid are added.
  """
  missing = [shard for shard in range(count_shards(job)) if shard not in valid]
  valid.update(shard for shard in missing if _find_fault(pathlib.Path(folder), job, shard) == '')
  return [shard for shard in missing if shard not in valid]


def claim_shards(folder: pathlib.Path, job: Job, replica: Replica) -> list[int]:
  """Claim the folder for the job, and return those of its missing shards that a replica samples.

  Process 0 lists the files and broadcasts the result. If each process looked for itself, a slower
  one would already see shards of the faster ones, and they would divide the work differently.

  Args:
    folder: the folder of the dataset.
    job: the job.
    replica: the replica.

  Raises:
    UserError: if the folder holds another job's shards, or this process does not share it.
  """
  digest, num_shards = job.digest(), count_shards(job)

  def claim() -> list[bool]:
    _claim_folder(folder, digest)
    faults = [_find_fault(folder, job, shard) for shard in range(num_shards)]
    for shard, fault in enumerate(faults):
      if fault and _is_of_launch(shard):
        path = d_cai.shard_path(folder, shard)
        say(f'{path} {fault}. It is written again from the journal.')
    return [fault == '' for fault in faults]

  # The processes first agree that process 0 has succeeded. If it raised an error just before the
  # broadcast, it would wait for the others in one collective operation, and they in another.
  listed = run_on_process_0(f'write to {folder}', claim)
  exists = np.array(listed or [False] * num_shards, np.int32)
  if jax.process_count() > 1:
    exists = multihost_utils.broadcast_one_to_all(exists)
  with exit_alone(replica):
    _check_folder(folder, digest)
  return _deal(np.flatnonzero(exists == 0).tolist(), replica)


def _deal(missing: list[int], replica: Replica) -> list[int]:
  """Return the missing shards that a replica samples.

  Launches of their own look at the folder at different times, so there the number of a shard
  decides, and not its place among the missing ones.
  """
  if launched_replica()[1] > 1:
    return [shard for shard in missing if _is_of_launch(shard)]
  return missing[replica.index :: replica.count]


def _is_of_launch(shard: int) -> bool:
  """Return whether this launch writes a shard if it is missing. Launches are one replica each."""
  launch, launches = launched_replica()
  return shard % launches == launch


def _find_fault(folder: pathlib.Path, job: Job, shard: int) -> str | None:
  """Return what is wrong with a shard of the job, as a clause; '' if nothing, None if it is absent.

  One with a fault is written again.
  """
  path, size = d_cai.shard_path(folder, shard), job.config.shard_rows
  if not path.exists():
    return None
  ids = [prompt.id for prompt, _ in job.prompts[shard * size : (shard + 1) * size]]
  try:
    ended = {entry['id'] for entry in read_ended(folder, shard)}
    is_whole = d_cai.read_ids(path) == [name for name in ids if name not in ended]
  except UserError:
    return 'is damaged'
  return '' if is_whole else 'holds other rows'


def is_claimed(folder: str | os.PathLike) -> bool:
  """Return whether a folder has been claimed for a job, whose shards it may hold."""
  return (pathlib.Path(folder) / JOB_FILE).exists()


def _claim_folder(folder: pathlib.Path, digest: str) -> None:
  """Write the job's digest into a folder that has none."""
  if not is_claimed(folder):
    make_folder(folder)
    write_json(folder / JOB_FILE, {'digest': digest})


def _check_folder(folder: pathlib.Path, digest: str) -> None:
  """Raise UserError unless the folder belongs to the job with this digest."""
  path = folder / JOB_FILE
  if not path.exists():
    raise UserError(
      f'Process {jax.process_index()} does not see {path}, which process 0 has written. '
      'Give all processes the same workdir on a filesystem that they share.'
    )
  if read_json(path) != {'digest': digest}:
    raise UserError(
      f'{folder} holds the shards of another job: a model, prompt, principle or setting has '
      'changed. Delete the folder or use another workdir.'
    )
