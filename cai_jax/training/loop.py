"""The training loop: a thin host loop around the train step, which resumes exactly."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from cai_jax.data import packing
from cai_jax.data.fingerprints import fingerprint
from cai_jax.data.units import Example, Unit, as_unit, check_units, unit_lengths
from cai_jax.model import peft
from cai_jax.model.attention.kernels.kernel import check_model, check_new_rows
from cai_jax.model.attention.sequence import check_sequence
from cai_jax.model.config import ModelConfig
from cai_jax.runtime import interruption
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import check_workdir
from cai_jax.runtime.interruption import Deferral, Interrupted
from cai_jax.runtime.mesh import check_batch, token_sharding
from cai_jax.training.attention import resolve_attention
from cai_jax.training.checkpoints import (
  ARITHMETIC,
  FOLDER,
  has_checkpoints,
  make_checkpointer,
  restore_latest,
  restore_state,
  save_checkpoint,
)
from cai_jax.training.fit_config import FitConfig
from cai_jax.training.held_out import HeldOut
from cai_jax.training.log import TrainingLog
from cai_jax.training.optimizer import check_warmup
from cai_jax.training.state import abstract_state, init_state, stack_state, unstack_state
from cai_jax.training.step import make_batches, make_eval_step, make_train_step, place_batch
from cai_jax.training.trace import StepTrace
from cai_jax.training.trainable import divide_model
from cai_jax.training.workload import measure_workload

# A function from the full parameters to answers with the keys id, prompt and text.
Probe = Callable[[Any], list[dict[str, str]]]


@dataclasses.dataclass(frozen=True)
class Monitoring:
  """What to observe during training, in addition to the training loss.

  Attributes:
    held_out: examples or units to evaluate the loss on.
    probe: function that answers fixed prompts with the current parameters; every process calls it.
    profile_steps: number of steps to record a profiler trace of, from the third step on. The trace
      is written to workdir/profile.
  """

  held_out: Sequence[Example | Unit] = ()
  probe: Probe | None = None
  profile_steps: int = 0


def fit(
  model: ModelConfig,
  params: Any,
  examples: Sequence[Example | Unit],
  config: FitConfig,
  mesh: Mesh,
  workdir: str | os.PathLike,
  buckets: Sequence[packing.Bucket] = (),
  init_id: str = '',
  monitoring: Monitoring = Monitoring(),
  init_name: str = '',
  take_over: bool = False,
) -> tuple[Any, dict[str, Any]]:
  """Train a model on examples or units, resuming from the latest checkpoint in `workdir`.

  A resumed run ends with bitwise the same parameters as an uninterrupted one. A run that is already
  complete only loads its result. With `config.patience` the result is the state with the lowest
  held-out loss, and otherwise the last one. The function writes the files of `TrainingLog` and the
  folders tensorboard/ and checkpoints/ to `workdir`, and adapter/ with `config.lora_export`.

  Args:
    model: architecture of the model.
    params: initial parameters. Arrays are copied; see `take_over`. Quantized kernels are not: the
      first step takes them over, and they cannot be used afterwards.
    examples: the training examples, or the units that the loss of `config` needs.
    config: settings of the run.
    mesh: the devices; the rows of a batch are split over the axes data and fsdp.
    workdir: folder of the run, created if it does not exist.
    buckets: batch shapes; an example goes to the shortest rows that hold it. The default is one
      bucket of `config.batch_size` rows of `config.max_length` tokens.
    init_id: identifies `params`, for example a fingerprint. It prevents resuming from different
      initial parameters.
    monitoring: what to observe during training.
    init_name: name of the initial model, which exported adapters refer to.
    take_over: delete `params` once the train state has its own, which saves the memory of a whole
      model in f32. They cannot be used afterwards. With adapters they are kept, because the result
      needs them.

  Returns:
    The trained parameters of the whole model, f32 on the mesh, and a summary of the run. Quantized
    kernels stay quantized, with their adapters beside them.

  Raises:
    UserError: before the first step, if there are no examples, they are not units of the loss, the
      warm-up takes all steps, there is a load-balancing loss for a dense model, the mesh does not
      divide the rows, the attention kernel cannot run on these devices, or the workdir is not
      writable or belongs to another run.
    NonFiniteError: if a loss or gradient norm is NaN or infinite.
    Interrupted: after SIGTERM or SIGINT, once a checkpoint is saved.
  """
  needed = ('reference',) if config.registered_loss.needs_reference else ()
  needed = (*config.needed_values, *needed)
  check_units(examples, config.registered_loss.units, needed)
  if len(examples) and len(monitoring.held_out):
    names = as_unit(examples[0]).values
    check_units(monitoring.held_out, config.registered_loss.units, needed, names)
  config, buckets, steps = plan_fit(model, examples, config, mesh, buckets)
  workdir = pathlib.Path(workdir)
  check_workdir(workdir)
  if not has_checkpoints(workdir):
    check_new_rows(config.attention, max(bucket.length for bucket in buckets))
  metadata = {
    **_describe_run(config, buckets, steps),
    'data': fingerprint(examples),
    'held_out': fingerprint(monitoring.held_out),
    'init': init_id,
  }
  divided = divide_model(model, params, config, mesh)
  layout = divided.layout
  shapes = jax.eval_shape(layout.stack, divided.params)
  train_step = make_train_step(divided.graph, shapes, config, len(steps), mesh, divided.frozen)
  sharding = token_sharding(mesh)
  iterator = packing.iterate_batches(
    make_batches(examples, steps, sharding), lambda batch: place_batch(batch, sharding)
  )
  eval_step = make_eval_step(divided.graph, config, mesh)
  held_out = HeldOut(eval_step, monitoring.held_out, buckets, config, sharding)
  workload = measure_workload(model, examples, steps, config, mesh)

  folder = workdir / FOLDER
  with make_checkpointer(folder, config.keep, lambda: held_out.best_step) as checkpointer:
    abstract = abstract_state(divided.params, config, mesh)
    restored = restore_latest(checkpointer, abstract, iterator, metadata, _defaults(config))
    if restored is None:
      first_step, state = 0, init_state(divided.params, config, mesh, layout)
    else:
      first_step, held_out.losses = restored.step, restored.held_out_losses
      state = stack_state(restored.state, config, mesh, layout)
    del restored  # or its arrays would stay in memory
    if take_over and divided.frozen is None:
      jax.block_until_ready(state)
      _delete_arrays(divided.params)
    state = dataclasses.replace(state, frozen=divided.frozen)
    with (
      TrainingLog(
        workdir,
        first_step,
        len(steps),
        config.log_every,
        workload,
        wandb=config.wandb,
        settings=dataclasses.asdict(config),
        section=config.section,
      ) as log,
      interruption.listen(),
      Deferral() as deferral,
      StepTrace(workdir / 'profile', first_step + 2, monitoring.profile_steps) as trace,
    ):
      step = first_step
      while step < len(steps) and not held_out.should_stop:
        trace.before_step(step, state)
        state, metrics = train_step(state, next(iterator))
        step += 1
        deferral.begin()  # only now, because the first step compiles for a long time
        log.log_step(step, metrics)
        is_last = step == len(steps)
        if is_last or _is_due(step, config.eval_every):
          log.write_pending()
          with log.pause_timer():
            if len(monitoring.held_out):
              log.log_held_out(step, held_out.evaluate(step, state))
            if monitoring.probe is not None:
              log.log_probes(step, monitoring.probe(divided.full_params(state)))
        is_last |= held_out.should_stop
        must_stop = deferral.must_stop(step)
        must_save = must_stop or is_last or step == held_out.best_step
        if must_save or _is_due(step, config.checkpoint_every):
          log.write_pending()  # raises if a number is not finite, so no such state is saved
          with log.pause_timer():
            saved = unstack_state(state.without_frozen, config, mesh, layout)
            save_checkpoint(checkpointer, step, saved, iterator, metadata, held_out.losses)
            del saved
        if must_stop and not is_last:
          detail = f'Stopped after step {step} of {len(steps)}, which is saved.'
          raise Interrupted(must_stop, detail)
      log.write_last_row()
      costs = log.summarize()  # here, so that its seconds do not include the wait for the last save
    clipped_share = int(state.clipped) / step
    exported_step = held_out.best_step or step
    if exported_step != step:
      best = restore_state(checkpointer, exported_step, abstract, config.section)
      best = stack_state(best, config, mesh, layout)
      state = dataclasses.replace(best, frozen=state.frozen)
  summary = {
    'steps': len(steps),
    'examples': len(examples),
    'padding_share': packing.padding_share(examples, steps),
    **costs,
    **held_out.summarize(),
    'steps_taken': step,
    'exported_step': exported_step,
    'clipped_share': clipped_share,
  }
  if config.lora is not None and config.lora_export:
    adapters = layout.unstack(state.eval_params)
    peft.write_adapters(workdir / 'adapter', adapters, model, config.lora, init_name)
  return divided.full_params(state), summary


class Plan(NamedTuple):
  """What `fit` does with its examples.

  Attributes:
    config: the settings, in which `attention` names the kernel that is used.
    buckets: the batch shapes.
    steps: which examples stand in which rows of each step.
  """

  config: FitConfig
  buckets: tuple[packing.Bucket, ...]
  steps: packing.Steps


def plan_fit(
  model: ModelConfig,
  examples: Sequence[Example | Unit],
  config: FitConfig,
  mesh: Mesh,
  buckets: Sequence[packing.Bucket] = (),
) -> Plan:
  """Return the plan of a training, after checking whether these settings can be run.

  The arguments are those of `fit`.

  Raises:
    UserError: if there are no examples, the warm-up takes all steps, there is a load-balancing loss
      for a dense model, the mesh does not divide the rows, or the attention kernel cannot run on
      these devices.
  """
  config.check_model(model)
  buckets = tuple(buckets) or (packing.Bucket(config.max_length, config.batch_size),)
  config = resolve_attention(config, mesh, [bucket.length for bucket in buckets], model)
  check_buckets(buckets, config, mesh, model)
  steps = packing.plan(unit_lengths(examples), buckets, config.epochs, config.seed)
  check_warmup(config, len(steps))
  return Plan(config, buckets, steps)


def _delete_arrays(tree: Any) -> None:
  """Free the device memory of a tree, which may have arrays of the host as well."""
  for x in jax.tree.leaves(tree):
    if isinstance(x, jax.Array):
      x.delete()


def _is_due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0


def _defaults(config: FitConfig) -> dict[str, Any]:
  return {field.name: field.default for field in dataclasses.fields(config)}


def check_buckets(
  buckets: Sequence[packing.Bucket], config: FitConfig, mesh: Mesh, model: ModelConfig
) -> None:
  """Check that batches of these shapes can be computed on a mesh.

  Args:
    buckets: the batch shapes.
    config: the run's settings, with the name of the attention kernel.
    mesh: the devices.
    model: architecture of the model.

  Raises:
    UserError: if accumulation or the mesh does not divide the rows, the mesh does not divide their
      tokens or the heads, or the attention kernel cannot run.
  """
  for bucket in buckets:
    if bucket.rows % config.accumulation:
      raise UserError(
        f'A batch of {bucket.rows} rows cannot be divided into '
        f'{config.section}.accumulation={config.accumulation} micro-batches. Use a divisor of the '
        'number of rows.'
      )
    name = f'{config.section}.batch_size / {config.section}.accumulation'
    check_batch(bucket.rows // config.accumulation, mesh, name)
    check_sequence(mesh, bucket.length, model)
    try:
      name = config.attention
      check_model(name, mesh, config.dtype, bucket.length, model, config.shares_tokens)
    except UserError as error:
      raise UserError(f'{config.section}.attention: {error}') from None


def _describe_run(
  config: FitConfig, buckets: Sequence[packing.Bucket], steps: packing.Steps
) -> dict[str, Any]:
  """Return the settings and the plan that a resumed run must share, in JSON types."""
  settings = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists
  return {
    **{name: settings[name] for name in settings if name not in config.may_change},
    'arithmetic': ARITHMETIC,
    'steps': len(steps),
    'buckets': [list(bucket) for bucket in buckets],
    'plan': steps.digest[:32],
  }
