"""The train state: its contents, its sharding and its initial value."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cai_jax.model.quantized.kernel import is_quantized, map_params
from cai_jax.model.sharding import param_shardings
from cai_jax.model.stacks import SEPARATE, Layout
from cai_jax.training.fit_config import FitConfig
from cai_jax.training.optimizer import make_optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that a train step reads and writes.

  Attributes:
    step: i32[], number of optimizer steps taken.
    clipped: i32[], number of them in which the gradient was clipped.
    params: the trained parameters, f32.
    opt_state: the optimizer's state, f32.
    ema: moving average of `params`, f32; None without `train.ema`.
    frozen: parameters that are not trained, in the compute dtype or quantized; None if all are
      trained.
  """

  step: Any
  clipped: Any
  params: Any
  opt_state: Any
  ema: Any = None
  frozen: Any = None

  @property
  def eval_params(self) -> Any:
    """The trained parameters to evaluate and to save: the moving average, if there is one."""
    return self.params if self.ema is None else self.ema

  @property
  def without_frozen(self) -> 'TrainState':
    """The state without its frozen parameters, which is what a checkpoint stores."""
    return dataclasses.replace(self, frozen=None)


def state_shardings(params: Any, config: FitConfig, mesh: Mesh, frozen: Any = None) -> TrainState:
  """Return a TrainState of NamedShardings.

  The optimizer's moments are sharded like their parameters, and scalars are replicated.

  Args:
    params: trained parameters, or their ShapeDtypeStructs.
    config: the run's settings.
    mesh: the devices.
    frozen: parameters that are not trained, if any.

  Raises:
    UserError: if the size of a mesh axis does not divide the dimension that it shards.
  """
  shardings = param_shardings(params, mesh)
  replicated = NamedSharding(mesh, P())
  optimizer = make_optimizer(config, 1)
  opt_state = optax.tree_utils.tree_map_params(
    optimizer,
    lambda _, sharding: sharding,
    jax.eval_shape(optimizer.init, params),
    shardings,
    transform_non_params=lambda _: replicated,
  )
  return TrainState(
    step=replicated,
    clipped=replicated,
    params=shardings,
    opt_state=opt_state,
    ema=shardings if config.ema else None,
    frozen=param_shardings(frozen, mesh),
  )


def abstract_state(params: Any, config: FitConfig, mesh: Mesh, frozen: Any = None) -> TrainState:
  """Return the initial TrainState as ShapeDtypeStructs with shardings, without computing it.

  The arguments are those of `state_shardings`.
  """
  shapes = jax.eval_shape(lambda *args: _initial_state(args[0], args[1], config), params, frozen)
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    shapes,
    state_shardings(params, config, mesh, frozen),
  )


def init_state(params: Any, config: FitConfig, mesh: Mesh, layout: Layout = SEPARATE) -> TrainState:
  """Return the TrainState before the first step, on the mesh, without frozen parameters.

  Args:
    params: parameters to train, of separate layers; the state owns an f32 copy of them.
    config: the run's settings.
    mesh: the devices.
    layout: which layers the state has in stacks.
  """
  shardings = state_shardings(jax.eval_shape(layout.stack, params), config, mesh)
  init = lambda p: _initial_state(layout.stack(p), None, config)  # noqa: E731
  return jax.jit(init, out_shardings=shardings)(params)


def place_frozen(params: Any, config: FitConfig, mesh: Mesh, layout: Layout = SEPARATE) -> Any:
  """Return the frozen parameters, on the mesh and in the compute dtype.

  Arrays are copied. Quantized kernels are not, if they are on the mesh: a train step, which donates
  its state, takes them over. Those of layers in stacks are deleted here, once they are stacked.

  Args:
    params: parameters that are not trained, of separate layers.
    config: the run's settings.
    mesh: the devices.
    layout: which layers the result has in stacks.
  """

  leaves, tree = jax.tree.flatten(params, is_leaf=is_quantized)
  shardings = jax.tree.leaves(param_shardings(params, mesh), is_leaf=is_quantized)
  arrays = {i: x for i, x in enumerate(leaves) if not is_quantized(x)}
  copy = jax.jit(
    lambda arrays: _copy(arrays, config.dtype), out_shardings={i: shardings[i] for i in arrays}
  )
  kernels = {i: x for i, x in enumerate(leaves) if i not in arrays}
  placed = copy(arrays) | {i: jax.device_put(x, shardings[i]) for i, x in kernels.items()}
  frozen = jax.tree.unflatten(tree, [placed[i] for i in range(len(leaves))])
  if not layout.runs:
    return frozen
  stacked = layout.stack(frozen)
  for array in jax.tree.leaves(list(kernels.values())):
    array.delete()
  return jax.device_put(stacked, param_shardings(stacked, mesh))


def stack_state(state: TrainState, config: FitConfig, mesh: Mesh, layout: Layout) -> TrainState:
  """Return a state of separate layers, which is what a checkpoint has, in a layout.

  Args:
    state: the state, without frozen parameters.
    config: the run's settings.
    mesh: the devices.
    layout: which layers the result has in stacks.
  """
  return _place(layout.stack(state), config, mesh) if layout.runs else state


def unstack_state(state: TrainState, config: FitConfig, mesh: Mesh, layout: Layout) -> TrainState:
  """Return a state in a layout as one of separate layers; the inverse of `stack_state`."""
  return _place(layout.unstack(state), config, mesh) if layout.runs else state


def _place(state: TrainState, config: FitConfig, mesh: Mesh) -> TrainState:
  return jax.device_put(state, state_shardings(state.params, config, mesh))


def _initial_state(params, frozen, config: FitConfig) -> TrainState:
  params = _copy(params, jnp.float32)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    clipped=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=make_optimizer(config, 1).init(params),
    ema=_copy(params, jnp.float32) if config.ema else None,
    frozen=map_params(lambda x: x if is_quantized(x) else _copy(x, config.dtype), frozen),
  )


def _copy(tree, dtype):
  return jax.tree.map(lambda p: jnp.array(p, dtype, copy=True), tree)
