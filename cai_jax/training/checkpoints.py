"""Checkpoints of a run by Orbax: train state, data iterator and what the run was."""

import os
import pathlib
from typing import Any

import grain
from orbax.checkpoint import v1 as ocp

from cai_jax.runtime.errors import UserError
from cai_jax.training.step import TrainState


def make_checkpointer(directory: str | os.PathLike, keep: int) -> ocp.training.Checkpointer:
  """A checkpointer of a folder that keeps the last `keep` steps; close it, or use it in `with`.

  What a killed save left behind is removed; the steps before it are untouched.
  """
  return ocp.training.Checkpointer(
    pathlib.Path(directory).absolute(),
    save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
    preservation_policy=ocp.training.preservation_policies.LatestN(keep),
    cleanup_tmp_directories=True,
  )


def save(
  checkpointer: ocp.training.Checkpointer,
  step: int,
  state: TrainState,
  iterator: grain.DatasetIterator,
  meta: dict[str, Any],
  losses: list[float],
) -> None:
  """Starts to save the state after `step` steps; arrays are copied before this returns.

  The iterator goes in by its position, so that it can go on while the save runs; `losses` are those
  found on held-out examples so far.
  """
  items = {'state': state, 'data': {'iterator': iterator.get_state(), 'held_out': losses}}
  checkpointer.save_checkpointables_async(step, items, custom_metadata=meta)


def restore(
  checkpointer: ocp.training.Checkpointer,
  abstract: TrainState,
  iterator: grain.DatasetIterator,
  meta: dict[str, Any],
) -> tuple[TrainState, int, list[float]] | None:
  """(state, step, held-out losses) of the newest checkpoint, with the iterator set; None if none.

  Args:
    abstract: ShapeDtypeStructs of a state of the same run, as `step.abstract_state` gives; its
      shardings may be other ones than those it was saved with.
    meta: what the run is, in JSON's types. It must equal what was saved.

  Raises:
    ValueError: if the checkpoint belongs to a run with another `meta`; it names what differs.
  """
  if checkpointer.latest is None:
    return None
  step = checkpointer.latest.step
  saved = checkpointer.metadata(step).custom_metadata
  changed = {k: (saved.get(k), meta.get(k)) for k in {*saved, *meta} if saved.get(k) != meta.get(k)}
  if changed:
    told = '; '.join(f'{k}: was {old!r}, is {new!r}' for k, (old, new) in sorted(changed.items()))
    raise UserError(
      f'{checkpointer.directory} holds checkpoints of another run ({told}): set these back to go '
      'on with it, or choose another workdir.'
    )
  items = checkpointer.load_checkpointables(step, {'state': abstract, 'data': None})
  iterator.set_state(items['data']['iterator'])
  return items['state'], step, list(items['data']['held_out'])
