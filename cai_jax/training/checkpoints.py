"""Checkpoints of a training run, in Orbax: train state, data iterator and metadata of the run."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from cai_jax.runtime.cloud import direct
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import writing
from cai_jax.runtime.settings import changed_settings
from cai_jax.runtime.terminal import say
from cai_jax.training.state import TrainState

# Version of what a step computes from the same settings and batch. Raise it when that changes, so
# that no run takes some of its steps in one way and the rest in another.
# 2: gradients are clipped by their norm per target token; the last step has a positive rate.
ARITHMETIC = 2

FOLDER = 'checkpoints'  # in the folder of a training


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


def has_checkpoints(workdir: pathlib.Path) -> bool:
  """Return whether a training in this folder has saved a checkpoint.

  Args:
    workdir: folder of the training.
  """
  folder = direct.place(workdir / FOLDER)
  with direct.asking(folder):
    return folder.is_dir() and any(folder.iterdir())


@contextlib.contextmanager
def make_checkpointer(
  directory: str | os.PathLike, keep: int, best_step: Callable[[], int | None] = lambda: None
) -> Iterator[ocp.training.Checkpointer]:
  """Yield a checkpointer for a folder, and wait for its saves at the end of the block.

  It removes what an interrupted save left behind. Complete checkpoints are not affected.

  Args:
    directory: folder of the checkpoints. In a run of several processes on a store, they are written
      to the store instead.
    keep: number of latest checkpoints to keep.
    best_step: function that returns a step whose checkpoint is kept as well, or None.

  Raises:
    StoppedError: if a checkpoint cannot be written; see `files.writing`.
  """
  policies = ocp.training.preservation_policies
  # Its threads may outlive the block, so the filter stays. Adding it again changes nothing.
  logging.getLogger('absl').addFilter(_is_not_from_orbax)
  place = direct.place(directory)
  with writing(directory):
    with direct.asking(place):
      checkpointer = ocp.training.Checkpointer(
        place,
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
        preservation_policy=policies.AnyPreservationPolicy(
          [policies.LatestN(keep), _BestStep(best_step)]
        ),
        cleanup_tmp_directories=True,
      )
    try:
      yield checkpointer
    finally:
      with direct.asking(place):
        checkpointer.close()  # raises what a save in the background raised


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
  """Drop what Orbax logs: a thousand lines for an error in a thread, which it raises as well."""
  return '/orbax/' not in record.pathname


def save_checkpoint(
  checkpointer: ocp.training.Checkpointer,
  step: int,
  state: TrainState,
  iterator: grain.DatasetIterator,
  metadata: dict[str, Any],
  held_out_losses: Mapping[int, float],
) -> None:
  """Start to save a checkpoint in the background.

  Before this returns, the step in hand has finished, and the arrays and the iterator's position are
  copied. The files are then written while training continues.

  Args:
    checkpointer: the checkpointer of the run, from `make_checkpointer`.
    step: number of steps taken.
    state: the state after them, without frozen parameters.
    iterator: iterator over the batches.
    metadata: settings and fingerprints that identify the run, in JSON types.
    held_out_losses: loss of each evaluation so far, by step.
  """
  data = {
    'iterator': iterator.get_state(),
    'held_out': [[step, loss] for step, loss in held_out_losses.items()],
    'checksum': _checksum(state),
  }
  data['digest'] = _digest(data, metadata)
  place = checkpointer.directory
  # Also raises what the save before raised in its thread.
  with writing(place), direct.asking(place):
    checkpointer.save_checkpointables_async(
      step, {'state': state, 'data': data}, custom_metadata=metadata
    )


def restore_latest(
  checkpointer: ocp.training.Checkpointer,
  abstract_state: TrainState,
  iterator: grain.DatasetIterator,
  metadata: dict[str, Any],
  defaults: Mapping[str, Any],
) -> Restored | None:
  """Load the latest checkpoint that is whole, and set the iterator to its position.

  Damaged checkpoints after it are deleted, and a line says so. Their steps are taken again, with
  the same result.

  Args:
    checkpointer: the checkpointer of the run, from `make_checkpointer`.
    abstract_state: ShapeDtypeStructs of the state, see `state.abstract_state`. Their shardings may
      differ from those at the time of saving.
    iterator: iterator over the batches, which is moved to the position after the checkpoint.
    metadata: settings and fingerprints that identify the run, which must equal the saved ones. If
      an older version saved the checkpoint and it lacks a training setting, the setting counts as
      having its default.
    defaults: the defaults of the training settings.

  Returns:
    The checkpoint, or None if the folder has none.

  Raises:
    UserError: if the checkpoint belongs to another run; the message lists what differs. Also if an
      older version saved it, whose steps computed something else, or if every checkpoint is
      damaged.
  """
  steps = sorted((checkpoint.step for checkpoint in checkpointer.checkpoints), reverse=True)
  damaged = []
  for step in steps:
    try:
      restored = _restore(checkpointer, step, abstract_state, iterator, metadata, defaults)
    except _Damaged as error:
      damaged.append(step)
      folder = checkpointer.directory / str(step)
      # One process cannot tell the others to take another step while they load this one.
      if step == steps[-1] or jax.process_count() > 1:
        raise UserError(
          f'{folder} is damaged: {error}. Restore it, or delete it; training then continues from '
          'the checkpoint before it, or from the start if there is none.'
        ) from error
      say(f'train: {folder} is damaged: {error}.', file=sys.stderr)
    else:
      break
  else:
    return None
  for step in damaged:
    with writing(checkpointer.directory):
      (checkpointer.directory / str(step)).rmtree()
  if damaged:
    checkpointer.reload()
    text = f'train: deleted it and continued from the checkpoint of step {restored.step}.'
    say(text, file=sys.stderr)
  return restored


class _Damaged(Exception):
  """A checkpoint that cannot be loaded, or is not what was saved."""


def _restore(
  checkpointer: ocp.training.Checkpointer,
  step: int,
  abstract_state: TrainState,
  iterator: grain.DatasetIterator,
  metadata: dict[str, Any],
  defaults: Mapping[str, Any],
) -> Restored:
  """Load the checkpoint of a step; see `restore_latest`.

  Raises:
    _Damaged: if it is damaged.
    UserError: if it belongs to another run or version.
  """
  saved, data = _load_data(checkpointer, step)
  if saved.get('arithmetic') != ARITHMETIC:
    raise UserError(
      f'{checkpointer.directory} holds checkpoints of another version of cai_jax, which clips '
      'gradients and ends schedules in another way. Finish the training with that version, or '
      'choose another workdir.'
    )
  if changes := changed_settings(saved, metadata, defaults):
    listed = '; '.join(f'{name}: was {old!r}, is {new!r}' for name, (old, new) in changes.items())
    raise UserError(
      f'{checkpointer.directory} holds checkpoints of another run ({listed}). Restore these '
      'settings to resume that run, or choose another workdir.'
    )
  state = _load_state(checkpointer, step, abstract_state, data)
  iterator.set_state(data['iterator'])
  return Restored(state, step, dict(data['held_out']))


def _load_data(
  checkpointer: ocp.training.Checkpointer, step: int
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Return metadata and data of a checkpoint, which fit each other."""
  try:
    metadata = checkpointer.metadata(step).custom_metadata or {}
    data = checkpointer.load_checkpointables(step, {'data': None})['data']
    fits = data.get('digest', '') == _digest(data, metadata)
    is_older = 'digest' not in data and 'arithmetic' not in metadata
  except Exception as error:  # Orbax raises many types for a file that is missing or cut
    direct.check_reached(checkpointer.directory, error)
    raise _Damaged(_one_line(error)) from error
  if not fits and not is_older:
    raise _Damaged('its data or metadata have changed since they were saved')
  return metadata, data


def _load_state(
  checkpointer: ocp.training.Checkpointer,
  step: int,
  abstract_state: TrainState,
  data: dict[str, Any],
) -> TrainState:
  """Return the train state of a checkpoint, whose bits are those that were saved."""
  try:
    state = checkpointer.load_checkpointables(step, {'state': abstract_state})['state']
  except Exception as error:  # as in `_load_data`
    direct.check_reached(checkpointer.directory, error)
    raise _Damaged(_one_line(error)) from error
  if _checksum(state) != data['checksum']:
    raise _Damaged('its arrays have changed since they were saved')
  if (taken := int(jax.device_get(state.step))) != step:
    raise _Damaged(f'it is the checkpoint of step {taken}, under another name')
  return state


def _checksum(state: TrainState) -> str:
  """Return a digest of the sums of the bits of each array, which do not depend on its sharding."""
  leaves = jax.tree.leaves(state)
  if jax.default_backend() == 'cpu' and all(x.is_fully_addressable for x in leaves):
    sums = [_sum_bits_on_host(np.asarray(x)) for x in leaves]  # without compiling a program
  else:
    sums = [int(total) for total in jax.device_get(_sum_bits(state))]
  return hashlib.sha256(str(sums).encode()).hexdigest()[:32]


def _sum_bits_on_host(x: np.ndarray) -> int:
  """Return the sum of the bits of an array as `_sum_bits` does."""
  bits = np.ascontiguousarray(x).reshape(-1).view(f'uint{8 * x.dtype.itemsize}')
  return int(bits.sum(dtype=np.uint32))


@jax.jit
def _sum_bits(state: TrainState) -> list[jax.Array]:
  """Return the sum of the bits of each array as u32[], which wraps around."""

  def total(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, f'uint{8 * x.dtype.itemsize}')
    return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)

  return [total(x) for x in jax.tree.leaves(state)]


def _digest(data: dict[str, Any], metadata: dict[str, Any]) -> str:
  """Return a digest of the data and metadata of a checkpoint, without that digest itself."""
  content = [{name: data[name] for name in data if name != 'digest'}, metadata]
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _one_line(error: Exception) -> str:
  return ' '.join(f'{type(error).__name__}: {error}'.split())[:200]


def restore_state(
  checkpointer: ocp.training.Checkpointer,
  step: int,
  abstract_state: TrainState,
  section: str = 'train',
) -> TrainState:
  """Load the train state of one step.

  Args:
    checkpointer: the checkpointer of the run, from `make_checkpointer`.
    step: number of steps taken.
    abstract_state: as for `restore_latest`.
    section: section of the config that has the settings of the run, for messages.

  Raises:
    UserError: if there is no checkpoint of that step, or it is damaged.
  """
  if step not in {checkpoint.step for checkpoint in checkpointer.checkpoints}:
    raise UserError(
      f'{checkpointer.directory / str(step)} is missing. It is the checkpoint with the lowest '
      f'held-out loss, which {section}.patience selects. Restore it, or train again in another '
      'workdir.'
    )
  try:
    return _load_state(checkpointer, step, abstract_state, _load_data(checkpointer, step)[1])
  except _Damaged as error:
    raise UserError(
      f'{checkpointer.directory / str(step)} is damaged: {error}. It is the checkpoint with the '
      f'lowest held-out loss, which {section}.patience selects. Restore it, or train again in '
      'another workdir.'
    ) from error
