"""The optimizer and the jitted train step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cai_jax.model import lora
from cai_jax.model.sharding import param_shardings, path_str
from cai_jax.runtime.mesh import BATCH, batch_sharding
from cai_jax.training.config import TrainConfig
from cai_jax.training.objective import WEIGHTS, Batch, loss_and_metrics

Schedule = Callable[[jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that a step reads and writes."""

  step: jax.Array  # i32[], optimizer steps taken
  params: Any  # f32, those that are trained
  opt_state: Any
  ema: Any = None  # f32, moving average of params; None without `train.ema`
  frozen: Any = None  # the rest of the model's parameters, in the compute dtype; None if none are

  @property
  def result(self) -> Any:
    """The trained parameters to be used: their moving average, if there is one."""
    return self.params if self.ema is None else self.ema

  @property
  def learnt(self) -> 'TrainState':
    """What a checkpoint must hold: all but what is frozen."""
    return dataclasses.replace(self, frozen=None)


def make_schedule(config: TrainConfig, num_steps: int) -> Schedule:
  """Learning rate by step i32[]: linear warm-up, then `config.schedule` to the end.

  The first step already learns and the last is at the schedule's end.
  """
  warmup = round(config.warmup * num_steps)
  peak, last = config.learning_rate, config.learning_rate * config.final_share
  rest = max(num_steps - warmup - 1, 1)
  falling = min(max(round(config.decay * num_steps), 1), rest)
  after = {
    'constant': lambda: optax.constant_schedule(peak),
    'linear': lambda: optax.linear_schedule(peak, last, rest),
    'cosine': lambda: optax.cosine_decay_schedule(peak, rest, config.final_share),
    'wsd': lambda: optax.join_schedules(
      [optax.constant_schedule(peak), optax.linear_schedule(peak, last, falling)],
      [max(num_steps - warmup - falling - 1, 0)],
    ),
  }[config.schedule]()
  if not warmup:
    return after
  rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
  return optax.join_schedules([rise, after], [warmup])


def decays(params) -> Any:
  """Which parameters decay, as a pytree of bools: kernels and tables, not norms nor biases.

  By name, since a bias [N,H] of a projection has as many axes as a kernel.
  """

  def by_name(path, _):
    kinds = {'kernel': True, 'table': True, 'a': True, 'b': True, 'scale': False, 'bias': False}
    return kinds[path_str(path[-1:])]

  return jax.tree_util.tree_map_with_path(by_name, params)


def make_optimizer(config: TrainConfig, num_steps: int) -> optax.GradientTransformation:
  """AdamW (Loshchilov and Hutter 2019) on gradients clipped by their global norm."""
  adamw = optax.adamw(
    make_schedule(config, num_steps),
    config.b1,
    config.b2,
    config.eps,
    weight_decay=config.weight_decay,
    mask=decays,
  )
  if not config.clip_norm:
    return adamw
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def state_shardings(params, config: TrainConfig, mesh: Mesh, frozen=None) -> TrainState:
  """A TrainState of NamedShardings; moments lie as their parameters do, scalars everywhere.

  Raises:
    ValueError: if an axis of the mesh does not divide the dimension that it splits.
  """
  by_param = param_shardings(params, mesh)
  everywhere = NamedSharding(mesh, P())
  optimizer = make_optimizer(config, 1)
  opt_state = optax.tree_utils.tree_map_params(
    optimizer,
    lambda _, sharding: sharding,
    jax.eval_shape(optimizer.init, params),
    by_param,
    transform_non_params=lambda _: everywhere,
  )
  return TrainState(
    step=everywhere,
    params=by_param,
    opt_state=opt_state,
    ema=by_param if config.ema else None,
    frozen=param_shardings(frozen, mesh),
  )


def abstract_state(params, config: TrainConfig, mesh: Mesh, frozen=None) -> TrainState:
  """The first TrainState as ShapeDtypeStructs with their shardings; nothing is computed."""
  shapes = jax.eval_shape(lambda *args: _first_state(*args, config), params, frozen)
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    shapes,
    state_shardings(params, config, mesh, frozen),
  )


def init_state(params, config: TrainConfig, mesh: Mesh) -> TrainState:
  """The TrainState before the first step, on the mesh; it owns a copy of params, cast to f32."""
  shardings = state_shardings(params, config, mesh)
  return jax.jit(lambda p: _first_state(p, None, config), out_shardings=shardings)(params)


def place_frozen(params, config: TrainConfig, mesh: Mesh) -> Any:
  """A copy of parameters that are not trained, on the mesh in the compute dtype."""
  shardings = param_shardings(params, mesh)
  return jax.jit(lambda p: _copy(p, config.dtype), out_shardings=shardings)(params)


def _first_state(params, frozen, config: TrainConfig) -> TrainState:
  params = _copy(params, jnp.float32)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=make_optimizer(config, 1).init(params),
    ema=_copy(params, jnp.float32) if config.ema else None,
    frozen=_copy(frozen, config.dtype),
  )


def _copy(tree, dtype):
  return jax.tree.map(lambda p: jnp.array(p, dtype, copy=True), tree)


def make_train_step(
  graph: nnx.GraphDef, params: Any, config: TrainConfig, num_steps: int, mesh: Mesh, frozen=None
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
  """`step(state, batch) -> (state, metrics)`, jitted; the state is donated.

  `graph` and `params` (with `frozen`, if there are such; arrays or ShapeDtypeStructs, for their
  shapes) are a model's two halves. The batch holds tokens, positions, segment_ids, loss_mask
  [B,T], laid out by `batch_sharding(mesh)`. Metrics, f32[]: loss (of the whole batch, in
  the configured normalization), grad_norm (before clipping), learning_rate, num_tokens (targets),
  num_sequences.
  """
  optimizer = make_optimizer(config, num_steps)
  schedule = make_schedule(config, num_steps)
  rows = batch_sharding(mesh)
  gradient = jax.value_and_grad(_loss(graph, config, rows), has_aux=True)

  def accumulated(params, frozen, batch):
    if config.accumulation == 1:
      return gradient(params, frozen, batch)
    micro = NamedSharding(mesh, P(None, *BATCH))

    def split(x):  # every device splits the rows that it holds already
      x = jnp.moveaxis(x.reshape(-1, config.accumulation, *x.shape[1:]), 1, 0)
      return jax.lax.with_sharding_constraint(x, micro)

    def add(total, batch):
      return jax.tree.map(jnp.add, total, gradient(params, frozen, batch)), None

    batches = jax.tree.map(split, batch)
    one = jax.tree.map(lambda x: x[0], batches)
    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, frozen, one)
    )
    return jax.lax.scan(add, zeros, batches)[0]

  def step(state: TrainState, batch: Batch):
    batch = jax.lax.with_sharding_constraint(batch, rows)
    (nll, sums), grads = accumulated(state.params, state.frozen, batch)
    weight = jnp.maximum(sums[WEIGHTS[config.loss_normalization]], 1.0)
    grads = jax.tree.map(lambda g: g / weight, grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics = {
      'loss': nll / weight,
      'grad_norm': optax.tree.norm(grads),
      'learning_rate': schedule(state.step),
      **sums,
    }
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if config.ema:
      ema = optax.incremental_update(params, ema, 1 - config.ema)
    return TrainState(state.step + 1, params, opt_state, ema, state.frozen), metrics

  shardings = state_shardings(params, config, mesh, frozen)
  return jax.jit(
    step,
    donate_argnums=0,
    in_shardings=(shardings, rows),
    out_shardings=(shardings, NamedSharding(mesh, P())),
  )


def make_eval_step(
  graph: nnx.GraphDef, config: TrainConfig, mesh: Mesh
) -> Callable[[Any, Any, Batch], dict[str, jax.Array]]:
  """`step(params, frozen, batch) -> sums`, jitted: nll, num_tokens, num_sequences, each f32[]."""
  loss = _loss(graph, config, batch_sharding(mesh))

  def step(params, frozen, batch: Batch):
    nll, sums = loss(params, frozen, batch)
    return {'nll': nll, **sums}

  return jax.jit(step, out_shardings=NamedSharding(mesh, P()))


def _loss(graph: nnx.GraphDef, config: TrainConfig, rows: NamedSharding):
  """`loss(params, frozen, batch)`: `objective.loss_and_metrics` as the config wants it computed."""

  def loss(params, frozen, batch):
    whole = params if frozen is None else lora.join(params, frozen)
    return loss_and_metrics(
      graph, whole, batch, sharding=rows, remat=config.remat, attention=config.attention
    )

  return loss
