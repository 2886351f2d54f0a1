"""The jitted train step and evaluation step."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cai_jax.data import packing
from cai_jax.data.units import Example, Unit
from cai_jax.model import lora
from cai_jax.model.attention.kernels.kernel import KERNELS
from cai_jax.runtime.compilation import xla_options
from cai_jax.runtime.mesh import TOKENS, place, rows_here, token_sharding
from cai_jax.training.fit_config import FitConfig
from cai_jax.training.losses import ROUTING, Batch, Sums, whole_of
from cai_jax.training.losses.balance import balance_loss, split_routing, usage_metrics
from cai_jax.training.optimizer import is_constant, make_optimizer, make_schedule
from cai_jax.training.state import TrainState, state_shardings


def place_batch(batch: dict[str, np.ndarray], sharding: NamedSharding) -> Batch:
  """Return a batch as global arrays; each process supplies the rows of its own devices.

  Args:
    batch: arrays of whole batches, [B,T]. The rows of this process's devices are read; see
      `rows_here`.
    sharding: sharding of the batch's rows.
  """
  return {name: place(x, sharding) for name, x in batch.items()}


def make_batches(
  examples: Sequence[Example | Unit], steps: Sequence[packing.Step], sharding: NamedSharding
) -> packing.Batches:
  """Return the batches of a plan for `place_batch`, in which a process builds its own rows only.

  Args:
    examples: the examples or units of the plan.
    steps: the plan.
    sharding: sharding of the rows of a batch.
  """
  needed = functools.cache(lambda bucket: rows_here((bucket.rows, bucket.length), sharding))
  return packing.Batches(examples, steps, needed)


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
  graph: nnx.GraphDef, config: FitConfig, sharding: NamedSharding
) -> Callable[..., tuple[jax.Array, Sums]]:
  """Return `loss(params, frozen, batch, whole=None) -> (loss, sums)`: the loss of the settings.

  `whole` has the sums of the whole batch if `batch` is a part of it. Only some losses use it.

  Args:
    graph: static half of the model.
    config: the run's settings.
    sharding: sharding of the batch's rows.
  """
  registered, settings = config.registered_loss, config.loss_settings
  options: dict[str, Any] = {'sharding': sharding}
  options |= {'remat': config.remat, 'attention': config.attention}
  if settings is not None:
    options['settings'] = settings

  def loss(params, frozen, batch, whole=None):
    all_params = params if frozen is None else lora.join(params, frozen)
    extra = {'whole': whole} if registered.needs_whole else {}
    return registered.function(graph, all_params, batch, **options, **extra)

  return loss


def make_train_step(
  graph: nnx.GraphDef,
  params: Any,
  config: FitConfig,
  num_steps: int,
  mesh: Mesh,
  frozen: Any = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
  """Return the jitted `step(state, batch) -> (state, metrics)`; it donates the state.

  The batch has the arrays of `packing.Batches`, [B,T] each, sharded by `token_sharding(mesh)`. The
  metrics, f32[] each, are `loss` (of the whole batch, normalized),
  `grad_norm` (before clipping), `learning_rate`, `clipped_share` (the share of the run's steps so
  far whose gradient was clipped), the loss's sums, such as `num_tokens`, and averages, such as
  `accuracy`; and for mixtures of experts those of `balance.usage_metrics`. `loss` never includes
  the load-balancing loss.

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
  row_sharding = token_sharding(mesh)
  accumulate_gradient = _make_gradient(graph, config, mesh)
  registered = config.registered_loss

  def step(state: TrainState, batch: Batch):
    batch = jax.lax.with_sharding_constraint(batch, row_sharding)
    (loss_sum, sums), grads = accumulate_gradient(state.params, state.frozen, batch)
    weight = _weight(config, sums)
    sums, routing = split_routing(sums)
    grads = jax.tree.map(lambda g: g / weight, grads)
    tokens_per_unit = _clip_unit(config, sums, weight)
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
      **registered.averages(sums),
      **({} if routing is None else usage_metrics(routing)),
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
    compiler_options=compiler_options(config, mesh),
  )


def _weight(config: FitConfig, sums: Sums) -> jax.Array:
  """Return the sum f32[] that divides the loss."""
  return jnp.maximum(sums[config.weight_name], 1.0)


def _clip_unit(config: FitConfig, sums: Sums, weight: jax.Array) -> jax.Array | float:
  """Return the factor of `clip_norm` that makes it a limit for the gradient of the divided loss."""
  return jnp.maximum(sums['num_tokens'], 1.0) / weight if config.clips_per_token else 1.0


def _make_gradient(
  graph: nnx.GraphDef, config: FitConfig, mesh: Mesh
) -> Callable[[Any, Any, Batch], tuple[tuple[jax.Array, Sums], Any]]:
  """Return `compute(params, frozen, batch) -> ((loss, sums), gradient)`, summed over micro-batches.

  The gradient is that of the summed loss, and of the load-balancing loss times `balance_loss` and
  times what the summed loss will be divided by.
  """
  loss = make_loss(graph, config, token_sharding(mesh))
  needs_whole = config.balance_loss or config.registered_loss.needs_whole

  def objective(params, frozen, batch, whole):
    loss_sum, sums = loss(params, frozen, batch, whole)
    if not config.balance_loss:
      return loss_sum, (loss_sum, sums)
    whole = whole_of(whole, sums)
    balance = balance_loss(whole[ROUTING], sums[ROUTING])
    return loss_sum + config.balance_loss * _weight(config, whole) * balance, (loss_sum, sums)

  def part(params, frozen, batch, whole=None):
    gradient, result = jax.grad(objective, has_aux=True)(params, frozen, batch, whole)
    return result, gradient

  def compute(params, frozen, batch):
    if config.accumulation == 1:
      return part(params, frozen, batch)
    micro_batches, whole = _split_batch(batch, config.accumulation, mesh), None
    if needs_whole:
      # Each micro-batch needs sums over all of them, such as the use of experts, so this computes
      # them twice. XLA drops the loss, of which nothing is used here.
      whole = _sum_over(lambda micro: loss(params, frozen, micro)[1], micro_batches)
    return _sum_over(lambda micro: part(params, frozen, micro, whole), micro_batches)

  return compute


def _split_batch(batch: Batch, count: int, mesh: Mesh) -> Batch:
  """Return arrays [count,B/count,T] of micro-batches."""
  sharding = NamedSharding(mesh, P(None, *TOKENS))

  def split(x):
    # Each device splits the rows that it already holds, so no row moves.
    x = jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0)
    return jax.lax.with_sharding_constraint(x, sharding)

  return jax.tree.map(split, batch)


def _sum_over(function: Callable[[Batch], Any], micro_batches: Batch) -> Any:
  """Return the sum of a function's results over micro-batches, one after the other."""

  def add(total, micro_batch):
    return jax.tree.map(jnp.add, total, function(micro_batch)), None

  first = jax.tree.map(lambda x: x[0], micro_batches)
  shapes = jax.eval_shape(function, first)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  return jax.lax.scan(add, zeros, micro_batches)[0]


def is_deterministic(config: FitConfig, mesh: Mesh) -> bool:
  """Return whether the train step gives the same bits in every run on the same devices.

  By default, GPUs add the gradients of embeddings in an order that differs from run to run.

  Args:
    config: the run's settings.
    mesh: the devices.
  """
  if mesh.devices.flat[0].platform != 'gpu':
    return True
  return config.deterministic and KERNELS[config.attention].deterministic


def compiler_options(config: FitConfig, mesh: Mesh) -> dict[str, bool | int] | None:
  """Return the XLA options of the programs of a training, or None for the default ones.

  Args:
    config: the run's settings.
    mesh: the devices.
  """
  options = xla_options(mesh.devices.flat[0].platform)
  if options is not None and is_deterministic(config, mesh):
    options['xla_gpu_deterministic_ops'] = True
  return options


def make_eval_step(graph: nnx.GraphDef, config: FitConfig, mesh: Mesh) -> Callable[..., Sums]:
  """Return the jitted `step(params, frozen, batch, whole=None) -> sums`.

  The sums, f32[] each, are `loss_sum` and those that the loss returns, such as `num_tokens`.
  `whole` has the sums over all batches of an evaluation, for a loss that needs them.

  Args:
    graph: static half of the model.
    config: the run's settings.
    mesh: the devices.
  """
  loss = make_loss(graph, config, token_sharding(mesh))

  def step(params, frozen, batch: Batch, whole: Sums | None = None):
    loss_sum, sums = loss(params, frozen, batch, whole)
    return {'loss_sum': loss_sum, **split_routing(sums)[0]}

  return jax.jit(
    step,
    out_shardings=NamedSharding(mesh, P()),
    compiler_options=compiler_options(config, mesh),
  )
