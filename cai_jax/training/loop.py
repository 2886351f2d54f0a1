"""The training loop: host side, thin; every number is made in `step` and `data`."""

import dataclasses
import hashlib
import math
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from cai_jax.data import examples, packing, quality
from cai_jax.model import lora
from cai_jax.model.attention.kernels.kernel import check_kernel
from cai_jax.model.config import ModelConfig
from cai_jax.model.sharding import param_shardings
from cai_jax.model.transformer import abstract_model
from cai_jax.runtime import hardware
from cai_jax.runtime.errors import NonFiniteError, UserError
from cai_jax.runtime.files import check_workdir
from cai_jax.runtime.mesh import batch_sharding, check_batch, place
from cai_jax.training import checkpoints
from cai_jax.training import log as logs
from cai_jax.training.config import FREE, TrainConfig
from cai_jax.training.objective import WEIGHTS
from cai_jax.training.step import (
  TrainState,
  abstract_state,
  init_state,
  make_eval_step,
  make_train_step,
  place_frozen,
)

Probe = Callable[[Any], list[dict[str, str]]]  # parameters → answers: id, prompt, text


class Preempted(Exception):
  """The run was asked to end (SIGTERM), has saved a checkpoint and goes on when started again."""


@dataclasses.dataclass(frozen=True)
class Watch:
  """What else a run is to do beside training.

  Attributes:
    held_out: examples whose loss is measured.
    probe: answers to fixed prompts by parameters as they are; every process calls it.
    profile: steps that a trace is written of, to workdir/profile, from the third step on.
  """

  held_out: Sequence[examples.Example] = ()
  probe: Probe | None = None
  profile: int = 0


def fit(
  model: ModelConfig,
  params: Any,
  items: Sequence[examples.Example],
  config: TrainConfig,
  mesh: Mesh,
  workdir: str | os.PathLike,
  buckets: Sequence[packing.Bucket] = (),
  identity: str = '',
  watch: Watch = Watch(),
) -> tuple[Any, dict[str, Any]]:
  """(parameters after training on `items`, f32 on the mesh; summary of the run).

  Continues from the newest checkpoint in `workdir`, to bitwise the same end as a run that was never
  stopped; a run that is done only reads its result. Writes the files of `log`, tensorboard/ and
  checkpoints/ there. SIGTERM saves and ends it.

  Args:
    model, params: what is trained; params are copied.
    items: what to train on.
    config: `batch_size` and `max_length` give the shape of the batches where `buckets` is empty.
    mesh: devices; batch rows are split over data × fsdp.
    workdir: folder, made where it is absent.
    buckets: shapes of batches, an example going to the shortest rows that hold it.
    identity: names `params`, so that a run is not gone on with from others, such as a fingerprint.
    watch: what is looked at meanwhile.

  Raises:
    ValueError: before the first step: nothing to train on, rows that the mesh does not divide,
      attention that cannot run here, a workdir that cannot be written or holds another run.
    FloatingPointError: a loss or gradient norm that is not finite, naming the step and examples.
    Preempted: after a SIGTERM.
  """
  buckets = tuple(buckets) or (packing.Bucket(config.max_length, config.batch_size),)
  _check(buckets, config, mesh)
  steps = packing.plan([len(item.tokens) for item in items], buckets, config.epochs, config.seed)
  batches, sharding = packing.Batches(items, steps), batch_sharding(mesh)
  workdir = pathlib.Path(workdir)
  check_workdir(workdir)
  meta = {
    **_meta(config, buckets, steps),
    'data': fingerprint(items),
    'held_out': fingerprint(watch.held_out),
    'init': identity,
  }
  if config.lora is None:
    graph, trained, frozen = abstract_model(model, config.dtype)[0], params, None
  else:
    graph, _ = lora.abstract_model(model, config.lora, config.dtype)
    # By way of the host, as every process of a run has the same ones.
    trained = jax.device_get(lora.init(model, config.lora, jax.random.key(config.seed)))
    frozen = place_frozen(params, config, mesh)
    merge = jax.jit(
      lambda params, adapters: lora.merge(params, adapters, config.lora),
      out_shardings=param_shardings(params, mesh),
    )

  def whole(state: TrainState):
    """All parameters of the plain model, as they would be used."""
    return state.result if config.lora is None else merge(params, state.result)

  train_step = make_train_step(graph, trained, config, len(steps), mesh, frozen)
  iterator = packing.iterate(batches, lambda b: _place(b, sharding))
  work = _work(model, items, steps, batches.ids, config, mesh)
  held_out = HeldOut(make_eval_step(graph, config, mesh), watch.held_out, buckets, config, sharding)
  summary = {
    'steps': len(steps),
    'examples': len(items),
    'padding_share': packing.padding_share(items, steps),
  }
  with checkpoints.make_checkpointer(workdir / 'checkpoints', config.keep) as checkpointer:
    abstract = abstract_state(trained, config, mesh)
    found = checkpoints.restore(checkpointer, abstract, iterator, meta)
    state, first, held_out.losses = found or (init_state(trained, config, mesh), 0, [])
    state = dataclasses.replace(state, frozen=frozen)
    with (
      logs.Log(
        workdir,
        first,
        len(steps),
        config.log_every,
        work,
        wandb=config.wandb,
        settings=dataclasses.asdict(config),
      ) as log,
      Termination() as terminated,
      Trace(workdir / 'profile', first + 2, watch.profile) as trace,
    ):
      step = first
      while step < len(steps) and not held_out.exhausted:
        trace(step, state)
        state, metrics = train_step(state, next(iterator))
        log.add(step, metrics)
        step += 1
        last = step == len(steps)
        if last or (config.eval_every and step % config.eval_every == 0):
          log.flush()
          with log.elsewhere():
            if watch.held_out:
              log.held_out(step, held_out(state))
            if watch.probe is not None:
              log.probes(step, watch.probe(whole(state)))
        leave = terminated(step)
        last |= held_out.exhausted
        if leave or last or (config.checkpoint_every and step % config.checkpoint_every == 0):
          log.flush()  # which refuses numbers that are not finite: they are never saved
          with log.elsewhere():
            checkpoints.save(checkpointer, step, state.learnt, iterator, meta, held_out.losses)
        if leave and not last:
          raise Preempted(f'ended after step {step} of {len(steps)}, which is saved.')
      log.finish()
      summary |= log.summary() | held_out.summary()
      summary['steps_taken'] = step
  return whole(state), summary


def train(
  lm,
  rows: Sequence[dict[str, Any]],
  dialogue,
  config: TrainConfig,
  workdir: str | os.PathLike,
  probe: Probe | None = None,
  profile: int = 0,
  known: quality.References | None = None,
) -> tuple[Any, dict[str, Any]]:
  """(parameters of `lm` fine-tuned on D_CAI, summary with the examples' counts); see `fit`.

  Args:
    lm: LM to start from; it is left as it is.
    rows: of D_CAI, such as `d_cai.read_rows` gives.
    dialogue: Dialogue of the tokenizer.
    config: settings.
    workdir: folder for metrics, events and checkpoints.
    probe, profile: as of `Watch`.
    known: the constitution's `quality.build_references`, for `config.filters`.

  Raises:
    ValueError: as `fit` and `examples.examples`, and for rows longer than the model's context.
  """
  if config.max_length > lm.config.max_positions:
    raise UserError(
      f'train.max_length={config.max_length} is more than the {lm.config.max_positions} tokens of '
      f'the context of {lm.name}.'
    )
  found = examples.build_examples(
    rows,
    dialogue,
    target=config.target,
    helpfulness_share=config.helpfulness_share,
    max_length=config.max_length,
    drop_truncated=config.drop_truncated,
    filters=config.filters,
    known=known,
    seed=config.seed,
  )
  items, held_out = examples.hold_out(found.items, config.eval_share, config.seed)
  params, summary = fit(
    lm.config,
    lm.params,
    items,
    config,
    lm.mesh,
    workdir,
    identity=lm.fingerprint,
    watch=Watch(held_out, probe, profile),
  )
  return params, {**found.counts, 'held_out': len(held_out), **summary}


def fingerprint(items: Sequence[examples.Example]) -> str:
  """Hex digest of the examples, in their order."""
  digest = hashlib.sha256()
  for item in items:
    digest.update(np.int64(len(item.tokens)).tobytes())
    digest.update(item.tokens.tobytes() + item.loss_mask.tobytes())
  return digest.hexdigest()[:32]


class HeldOut:
  """The loss on held-out examples, and whether it is long since it fell.

  Args:
    eval_step: as `step.make_eval_step` gives it.
    items: the examples; there may be none.
    buckets: shapes of batches.
    config: the run's.
    sharding: of batches.
  """

  def __init__(self, eval_step, items, buckets, config: TrainConfig, sharding):
    self._step, self._config, self._sharding = eval_step, config, sharding
    self._batches = ()
    if items:
      micro = [packing.Bucket(b.length, b.rows // config.accumulation) for b in buckets]
      plan = packing.plan([len(item.tokens) for item in items], micro, 1, 0)
      self._batches = packing.Batches(items, plan)
    self.losses: list[float] = []  # of all evaluations of the run

  def __call__(self, state: TrainState) -> dict[str, float]:
    """loss, in the run's normalization, and nll_per_token."""
    sums = []
    for i in range(len(self._batches)):
      batch = _place(self._batches[i], self._sharding)
      sums.append(self._step(state.result, state.frozen, batch))
    total = {name: sum(float(s[name]) for s in jax.device_get(sums)) for name in sums[0]}
    loss = total['nll'] / max(total[WEIGHTS[self._config.loss_normalization]], 1.0)
    if not math.isfinite(loss):
      raise NonFiniteError(
        f'the loss on held-out examples is {loss}: lower train.learning_rate or set '
        'train.clip_norm. The checkpoints before it are kept.'
      )
    self.losses.append(loss)
    return {'loss': loss, 'nll_per_token': total['nll'] / max(total['num_tokens'], 1.0)}

  @property
  def exhausted(self) -> bool:
    """Whether the last `patience` evaluations have found no loss below the least before them."""
    patience, losses = self._config.patience, self.losses
    return 0 < patience < len(losses) and min(losses[-patience:]) >= min(losses[:-patience])

  def summary(self) -> dict[str, float | bool]:
    """Last and least held-out loss, and whether training stopped for want of a lower one."""
    if not self.losses:
      return {}
    return {
      'held_out_loss': self.losses[-1],
      'least_held_out_loss': min(self.losses),
      'stopped_early': self.exhausted,
    }


class Termination:
  """Whether a SIGTERM has come: `terminated(step)`; with many processes, the same for all.

  Then JAX's own service takes the signal, and finds a step that none has passed yet.
  """

  def __init__(self):
    self._asked, self._before = False, None

  def __enter__(self):
    alone = jax.process_count() == 1
    if alone and threading.current_thread() is threading.main_thread():
      self._before = signal.signal(signal.SIGTERM, self._ask)
    return self

  def __exit__(self, *_):
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def __call__(self, step: int) -> bool:
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._asked

  def _ask(self, *_):
    self._asked = True


class Trace:
  """Writes a profiler's trace of `count` steps, from step `begin` on."""

  def __init__(self, folder: pathlib.Path, begin: int, count: int):
    self._folder, self._begin, self._end = folder, begin, begin + count
    self._runs = False

  def __enter__(self):
    return self

  def __call__(self, step: int, state: TrainState) -> None:
    """Begins or ends the trace, if it is time, once the device has come to `state`."""
    if self._runs and step >= self._end:
      jax.block_until_ready(state)
      self.__exit__()
    elif self._begin <= step < self._end and not self._runs:
      jax.block_until_ready(state)
      jax.profiler.start_trace(str(self._folder))
      self._runs = True

  def __exit__(self, *_):
    if self._runs:
      jax.profiler.stop_trace()
      self._runs = False


def _check(buckets: Sequence[packing.Bucket], config: TrainConfig, mesh: Mesh) -> None:
  for bucket in buckets:
    if bucket.rows % config.accumulation:
      raise UserError(
        f'{bucket.rows} rows are not divided by train.accumulation={config.accumulation}.'
      )
    name = 'train.batch_size / train.accumulation'
    check_batch(bucket.rows // config.accumulation, mesh, name)
    try:
      check_kernel(config.attention, mesh, config.dtype, bucket.length)
    except ValueError as error:
      raise UserError(f'train.attention: {error}') from None


def _meta(config: TrainConfig, buckets, steps: Sequence[packing.Step]) -> dict[str, Any]:
  """What of the settings a run must be gone on with, in JSON's types."""
  return {
    **{k: v for k, v in dataclasses.asdict(config).items() if k not in FREE},
    'filters': list(config.filters),
    'steps': len(steps),
    'buckets': [list(bucket) for bucket in buckets],
    'plan': hashlib.sha256(repr(steps).encode()).hexdigest()[:32],  # which step has which examples
  }


def _work(model: ModelConfig, items, steps, ids, config: TrainConfig, mesh: Mesh) -> logs.Work:
  lengths = np.array([len(item.tokens) for item in items])
  of_step = [lengths[[i for row in step.rows for i in row]] for step in steps]
  return logs.Work(
    tokens=np.array([x.sum() for x in of_step]),
    flops=np.array([model.training_flops(x, adapters=config.lora is not None) for x in of_step]),
    peak=hardware.peak_flops(list(mesh.devices.flat), config.dtype),
    ids=ids,
  )


def _place(batch: dict[str, np.ndarray], sharding) -> dict[str, jax.Array]:
  """The batch as global arrays; each host gives its devices their rows of it."""
  return {name: place(x, sharding) for name, x in batch.items()}
