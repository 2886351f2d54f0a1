"""The jitted train step and evaluation step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cai_jax.model import lora
from cai_jax.model.attention.kernels.kernel import KERNELS
from cai_jax.runtime.compilation import xla_options
from cai_jax.runtime.mesh import BATCH, batch_sharding, place
from cai_jax.training.config import TrainConfig
from cai_jax.training.losses import LOSSES, Batch, Sums
from cai_jax.training.optimizer import is_constant, make_optimizer, make_schedule
from cai_jax.training.state import TrainState, state_shardings


def place_batch(batch: dict[str, np.ndarray], sharding: NamedSharding) -> Batch:
  """Return a batch as global arrays; each process supplies the rows of its own devices.

  Args:
    batch: arrays of whole batches, i32[B,T], the same in every process.
    sharding: sharding of the batch's rows.
  """
  return {name: place(x, sharding) for name, x in batch.items()}


def _average(params: Any, ema: Any, share: float) -> Any:
  """Return the next moving average of parameters.

  Constant ones stay as they are: their average with themselves would be rounded in each step.

  Args:
    params: the parameters after the step.
    ema: the moving average before it.
    share: weight of `ema`.
  """
  averaged = optax.incremental_update(params, ema, 1 - share)
  keep = lambda path, new, old: old if is_constant(path) else new  # noqa: E731
  return jax.tree_util.tree_map_with_path(keep, averaged, ema)


def make_loss(
  graph: nnx.GraphDef, config: TrainConfig, sharding: NamedSharding
) -> Callable[[Any, Any, Batch], tuple[jax.Array, Sums]]:
  """Return `loss(params, frozen, batch) -> (loss, sums)`: the loss named by `config.loss`.

  Args:
    graph: static half of the model.
    config: the run's settings.
    sharding: sharding of the batch's rows.
  """
  function = LOSSES[config.loss].function

  def loss(params, frozen, batch):
    all_params = params if frozen is None else lora.join(params, frozen)
    return function(
      graph, all_params, batch, sharding=sharding, remat=config.remat, attention=config.attention
    )

  return loss


def make_train_step(
  graph: nnx.GraphDef,
  params: Any,
  config: TrainConfig,
  num_steps: int,
  mesh: Mesh,
  frozen: Any = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
  """Return the jitted `step(state, batch) -> (state, metrics)`; it donates the state.

  The batch holds tokens, positions, segment_ids and loss_mask, i32[B,T] each, sharded by
  `batch_sharding(mesh)`. The metrics, f32[] each, are `loss` (of the whole batch, normalized),
  `grad_norm` (before clipping), `learning_rate`, `clipped_share` (the share of the run's steps so
  far whose gradient was clipped), and the loss's sums, such as `num_tokens`.

  Args:
    graph: static half of the model.
    params: trained parameters, or ShapeDtypeStructs; only their shapes are used.
    config: the run's settings.
    num_steps: number of optimizer steps of the whole run, which determines the schedule.
    mesh: the devices.
    frozen: parameters that are not trained, if any; only their shapes are used.
  """
  optimizer = make_optimizer(config, num_steps)
  schedule = make_schedule(config, num_steps)
  row_sharding = batch_sharding(mesh)
  compute_gradient = jax.value_and_grad(make_loss(graph, config, row_sharding), has_aux=True)
  weight_name = LOSSES[config.loss].normalizations[config.loss_normalization]

  def accumulate_gradient(params, frozen, batch):
    if config.accumulation == 1:
      return compute_gradient(params, frozen, batch)
    micro_sharding = NamedSharding(mesh, P(None, *BATCH))

    def split(x):
      # Each device splits the rows that it already holds, so no row moves.
      x = jnp.moveaxis(x.reshape(-1, config.accumulation, *x.shape[1:]), 1, 0)
      return jax.lax.with_sharding_constraint(x, micro_sharding)

    def add(total, micro_batch):
      gradient = compute_gradient(params, frozen, micro_batch)
      return jax.tree.map(jnp.add, total, gradient), None

    micro_batches = jax.tree.map(split, batch)
    first = jax.tree.map(lambda x: x[0], micro_batches)
    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute_gradient, params, frozen, first)
    )
    return jax.lax.scan(add, zeros, micro_batches)[0]

  def step(state: TrainState, batch: Batch):
    batch = jax.lax.with_sharding_constraint(batch, row_sharding)
    (loss_sum, sums), grads = accumulate_gradient(state.params, state.frozen, batch)
    weight = jnp.maximum(sums[weight_name], 1.0)
    grads = jax.tree.map(lambda g: g / weight, grads)
    tokens_per_unit = jnp.maximum(sums['num_tokens'], 1.0) / weight
    updates, opt_state = optimizer.update(
      grads, state.opt_state, state.params, tokens_per_unit=tokens_per_unit
    )
    grad_norm, clipped = optax.tree.norm(grads), state.clipped
    if config.clip_norm:
      clipped += grad_norm > config.clip_norm * tokens_per_unit
    metrics = {
      'loss': loss_sum / weight,
      'grad_norm': grad_norm,
      'learning_rate': schedule(state.step),
      'clipped_share': clipped / (state.step + 1),
      **sums,
    }
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if config.ema:
      ema = _average(params, ema, config.ema)
    return TrainState(state.step + 1, clipped, params, opt_state, ema, state.frozen), metrics

  shardings = state_shardings(params, config, mesh, frozen)
  return jax.jit(
    step,
    donate_argnums=0,
    in_shardings=(shardings, row_sharding),
    out_shardings=(shardings, NamedSharding(mesh, P())),
    compiler_options=_compiler_options(config, mesh),
  )


def is_deterministic(config: TrainConfig, mesh: Mesh) -> bool:
  """Return whether the train step gives the same bits in every run on the same devices.

  By default, GPUs add the gradients of embeddings in an order that differs from run to run.

  Args:
    config: the run's settings.
    mesh: the devices.
  """
  if mesh.devices.flat[0].platform != 'gpu':
    return True
  return config.deterministic and KERNELS[config.attention].deterministic


def _compiler_options(config: TrainConfig, mesh: Mesh) -> dict[str, bool | int] | None:
  """Return the XLA options of the train step, or None for the default ones."""
  options = xla_options(mesh.devices.flat[0].platform)
  if options is not None and is_deterministic(config, mesh):
    options['xla_gpu_deterministic_ops'] = True
  return options


def make_eval_step(
  graph: nnx.GraphDef, config: TrainConfig, mesh: Mesh
) -> Callable[[Any, Any, Batch], Sums]:
  """Return the jitted `step(params, frozen, batch) -> sums`.

  The sums, f32[] each, are `loss_sum` and those that the loss returns, such as `num_tokens`.

  Args:
    graph: static half of the model.
    config: the run's settings.
    mesh: the devices.
  """
  loss = make_loss(graph, config, batch_sharding(mesh))

  def step(params, frozen, batch: Batch):
    loss_sum, sums = loss(params, frozen, batch)
    return {'loss_sum': loss_sum, **sums}

  options = xla_options(mesh.devices.flat[0].platform)
  return jax.jit(step, out_shardings=NamedSharding(mesh, P()), compiler_options=options)
