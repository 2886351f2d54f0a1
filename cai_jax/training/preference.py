"""Training on preferences: from units to the trained parameters."""

import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cai_jax.data.examples import hold_out
from cai_jax.data.units import (
  Unit,
  check_units,
  segment_lengths,
  share_prompts,
  shared_counts,
  unit_lengths,
)
from cai_jax.model.lm import LM
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import check_workdir
from cai_jax.training.loop import Monitoring, Probe, fit, plan_fit
from cai_jax.training.prefer_config import PreferConfig
from cai_jax.training.reference import add_reference, initial_id, initial_model


def prefer(
  lm: LM,
  units: Sequence[Unit],
  config: PreferConfig,
  workdir: str | os.PathLike,
  *,
  groups: Mapping[str, int] | None = None,
  load_reference: Callable[[], LM] | None = None,
  reference_id: str = '',
  probe: Probe | None = None,
  profile_steps: int = 0,
  take_over: bool = False,
) -> tuple[Any, dict[str, Any]]:
  """Train a model on comparisons or judged responses.

  Args:
    lm: the initial model. With the adapters of `config.lora_init`, if there are any, it is by
      default the reference as well. It does not change, except that training takes over its
      quantized kernels, and with `take_over` its parameters; see `fit`.
    units: the tokenized data, see `Unit`.
    config: settings of the run.
    workdir: folder of the run; see `fit`. Reference log-probabilities are kept in it.
    groups: group of each unit by its id, such as near-duplicates, which are held out together. By
      default, units with the same tokens before their first learned one are a group, so all
      comparisons of a prompt are on one side. Units of a reward model learn the last token alone:
      give their groups.
    load_reference: returns another reference model. It is called at most once, and only if the
      workdir does not have its log-probabilities.
    reference_id: fingerprint of that model; both are given, or neither.
    probe: function that answers fixed prompts at each evaluation; see `Monitoring`.
    profile_steps: number of steps to record a profiler trace of.
    take_over: whether `lm.params` may be deleted, which saves memory; see `fit`.

  Returns:
    The trained parameters, see `fit`, and a summary of the run.

  Raises:
    UserError: before the first step, if there are no units, they are not those of the objective, a
      sequence exceeds the context of a model, or the reference has another tokenizer; see also
      `hold_out` and `fit`.
    ValueError: if only one of `load_reference` and `reference_id` is given.
    NonFiniteError: if a loss or gradient norm is NaN or infinite.
    Interrupted: after SIGTERM or SIGINT, once a checkpoint is saved.
  """
  workdir, loss = pathlib.Path(workdir), config.registered_loss
  if (load_reference is None) == bool(reference_id):
    raise ValueError('Give both load_reference and reference_id, or neither.')
  check_workdir(workdir)
  if not len(units):
    raise UserError(f'There is no unit to train on for {config.section}.objective.')
  check_units(units, loss.units, config.needed_values)
  if config.share_prompts:
    units = share_prompts(units)
  _check_lengths(lm, units, config)
  if groups is None and config.eval_share:
    groups = group_by_prompt(units)

  def split() -> tuple[Sequence[Unit], Sequence[Unit]]:
    return hold_out(units, config.eval_share, config.seed, groups, config.section)

  training, held_out = split()
  plan_fit(lm.config, training, config, lm.mesh)  # before the reference is computed
  if loss.needs_reference:
    load = functools.partial(_load_reference, load_reference, lm, units, config)
    model_id = reference_id or initial_id(lm, config)
    units = add_reference(load, model_id, units, config, workdir)
    training, held_out = split()
  params, summary = fit(
    lm.config,
    lm.params,
    training,
    config,
    lm.mesh,
    workdir,
    init_id=lm.fingerprint,
    monitoring=Monitoring(held_out, probe, profile_steps),
    init_name=lm.name,
    take_over=take_over,
  )
  counts = {'units': len(units), 'held_out': len(held_out)}
  if config.share_prompts:
    counts['shared_tokens'] = int(shared_counts(units).sum())
  return params, {**counts, **summary}


def _load_reference(
  load: Callable[[], LM] | None, lm: LM, units: Sequence[Unit], config: PreferConfig
) -> LM:
  """Return the checked reference of `prefer`, by default the model that training starts from."""
  if load is None:
    return initial_model(lm, config)
  reference = load()
  check_reference(lm, reference, config)
  _check_lengths(reference, units, config)
  return reference


def group_by_prompt(units: Sequence[Unit]) -> dict[str, int]:
  """Return the group of each unit by its id: units with the same tokens before the first learned.

  Args:
    units: the units.
  """
  numbers: dict[bytes, int] = {}
  groups = {}
  for unit in units:
    first = unit.segments[0]
    prompt = first.tokens[: int(first.loss_mask.argmax())].tobytes()
    groups[unit.id] = numbers.setdefault(prompt, len(numbers))
  return groups


def check_reference(lm: LM, reference: LM, config: PreferConfig) -> None:
  """Check that a reference reads the tokens of the trained model.

  Args:
    lm: the model that is trained.
    reference: the reference model.
    config: settings of the run.

  Raises:
    UserError: if the two have different tokenizers.
  """
  if lm.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
    raise UserError(
      f'{config.section}.reference: {reference.name} has another tokenizer than {lm.name}, so it '
      'cannot score its tokens. Choose a reference with the same tokenizer, or leave it empty to '
      'use the model that training starts from.'
    )


def _check_lengths(lm: LM, units: Sequence[Unit], config: PreferConfig) -> None:
  """Check that the model has a position for each token, and that a row holds each unit."""
  sizes = segment_lengths(units)
  # Without sharing, so that sharing leaves nobody else out.
  lengths = np.asarray(unit_lengths(units)) + shared_counts(units) * (sizes.lengths - 1)
  longest = np.maximum.reduceat(sizes.values, sizes.offsets[:-1])
  for i in np.flatnonzero((longest > lm.max_positions) | (lengths > config.max_length)):
    unit = units[int(i)]
    if longest[i] > lm.max_positions:
      raise UserError(
        f'{unit.id}: a sequence of {longest[i]} tokens does not fit the context of {lm.name}, '
        f'which holds {lm.max_positions}. Leave it out.'
      )
    raise UserError(
      f'{unit.id} has {lengths[i]} tokens with its {len(unit.segments)} sequences, but a row '
      f'holds {config.section}.max_length={config.max_length}. Raise it, or leave the unit out.'
    )
