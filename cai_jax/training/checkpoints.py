"""Checkpoints of a training run, in Orbax: train state, data iterator and metadata of the run."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import grain
from orbax.checkpoint import v1 as ocp

from cai_jax.runtime.errors import UserError
from cai_jax.runtime.settings import changed_settings
from cai_jax.training.config import TrainConfig
from cai_jax.training.state import TrainState

# Version of what a step computes from the same settings and batch. Raise it when that changes, so
# that no run takes some of its steps in one way and the rest in another.
# 2: gradients are clipped by their norm per target token; the last step has a positive rate.
ARITHMETIC = 2


class Restored(NamedTuple):
  """The contents of a checkpoint.

  Attributes:
    state: the train state, without frozen parameters.
    step: number of steps taken.
    held_out_losses: loss of each evaluation up to that step, by step.
  """

  state: TrainState
  step: int
  held_out_losses: dict[int, float]


@dataclasses.dataclass(frozen=True)
class _BestStep:
  """A preservation policy that keeps the checkpoint of one step, which may change."""

  step: Callable[[], int | None]

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    return [checkpoint.step == self.step() for checkpoint in checkpoints]


def make_checkpointer(
  directory: str | os.PathLike, keep: int, best_step: Callable[[], int | None] = lambda: None
) -> ocp.training.Checkpointer:
  """Return a checkpointer for a folder; use it in a `with` statement or close it.

  It removes what an interrupted save left behind. Complete checkpoints are not affected.

  Args:
    directory: folder of the checkpoints.
    keep: number of latest checkpoints to keep.
    best_step: function that returns a step whose checkpoint is kept as well, or None.
  """
  policies = ocp.training.preservation_policies
  return ocp.training.Checkpointer(
    pathlib.Path(directory).absolute(),
    save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
    preservation_policy=policies.AnyPreservationPolicy(
      [policies.LatestN(keep), _BestStep(best_step)]
    ),
    cleanup_tmp_directories=True,
  )


def save_checkpoint(
  checkpointer: ocp.training.Checkpointer,
  step: int,
  state: TrainState,
  iterator: grain.DatasetIterator,
  metadata: dict[str, Any],
  held_out_losses: Mapping[int, float],
) -> None:
  """Start to save a checkpoint in the background.

  The arrays and the iterator's position are copied before this returns, so training can continue
  at once.

  Args:
    checkpointer: the checkpointer of the run, from `make_checkpointer`.
    step: number of steps taken.
    state: the state after them, without frozen parameters.
    iterator: iterator over the batches.
    metadata: settings and fingerprints that identify the run, in JSON types.
    held_out_losses: loss of each evaluation so far, by step.
  """
  held_out = [[step, loss] for step, loss in held_out_losses.items()]
  data = {'iterator': iterator.get_state(), 'held_out': held_out}
  checkpointer.save_checkpointables_async(
    step, {'state': state, 'data': data}, custom_metadata=metadata
  )


def restore_latest(
  checkpointer: ocp.training.Checkpointer,
  abstract_state: TrainState,
  iterator: grain.DatasetIterator,
  metadata: dict[str, Any],
) -> Restored | None:
  """Load the latest checkpoint and set the iterator to its position.

  Args:
    checkpointer: the checkpointer of the run, from `make_checkpointer`.
    abstract_state: ShapeDtypeStructs of the state, see `state.abstract_state`. Their shardings may
      differ from those at the time of saving.
    iterator: iterator over the batches, which is moved to the position after the checkpoint.
    metadata: settings and fingerprints that identify the run, which must equal the saved ones. If
      an older version saved the checkpoint and it lacks a training setting, the setting counts as
      having its default.

  Returns:
    The checkpoint, or None if the folder has none.

  Raises:
    UserError: if the checkpoint belongs to another run; the message lists what differs. Also if an
      older version saved it, whose steps computed something else.
  """
  if checkpointer.latest is None:
    return None
  step = checkpointer.latest.step
  saved = checkpointer.metadata(step).custom_metadata or {}
  if saved.get('arithmetic') != ARITHMETIC:
    raise UserError(
      f'{checkpointer.directory} holds checkpoints of another version of cai_jax, which clips '
      'gradients and ends schedules in another way. Finish the training with that version, or '
      'choose another workdir.'
    )
  defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
  if changes := changed_settings(saved, metadata, defaults):
    listed = '; '.join(f'{name}: was {old!r}, is {new!r}' for name, (old, new) in changes.items())
    raise UserError(
      f'{checkpointer.directory} holds checkpoints of another run ({listed}). Restore these '
      'settings to resume that run, or choose another workdir.'
    )
  items = checkpointer.load_checkpointables(step, {'state': abstract_state, 'data': None})
  iterator.set_state(items['data']['iterator'])
  return Restored(items['state'], step, dict(items['data']['held_out']))


def restore_state(
  checkpointer: ocp.training.Checkpointer, step: int, abstract_state: TrainState
) -> TrainState:
  """Load the train state of one step.

  Args:
    checkpointer: the checkpointer of the run, from `make_checkpointer`.
    step: number of steps taken.
    abstract_state: as for `restore_latest`.

  Raises:
    UserError: if there is no checkpoint of that step.
  """
  if step not in {checkpoint.step for checkpoint in checkpointer.checkpoints}:
    raise UserError(
      f'{checkpointer.directory / str(step)} is missing. It is the checkpoint with the lowest '
      'held-out loss, which train.patience selects. Restore it, or train again in another workdir.'
    )
  return checkpointer.load_checkpointables(step, {'state': abstract_state})['state']
