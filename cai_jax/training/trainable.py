"""The trained parameters of a model: all of them, or low-rank adapters with the rest frozen.

The head of a reward model is trained in both cases, because it starts from random numbers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from cai_jax.model import lora, peft
from cai_jax.model.config import ModelConfig
from cai_jax.model.quantized.kernel import (
  FORMATS,
  FULL,
  AdaptedKernel,
  has_quantized,
  is_quantized,
  map_params,
)
from cai_jax.model.score_head import HEAD, join_head, split_head
from cai_jax.model.sharding import param_shardings
from cai_jax.model.stacks import Layout, arrange_layers
from cai_jax.model.transformer import Params, abstract_model
from cai_jax.runtime.errors import UserError
from cai_jax.training.fit_config import FitConfig
from cai_jax.training.state import TrainState, place_frozen


@dataclasses.dataclass(frozen=True)
class TrainableModel:
  """A model divided into trained and frozen parameters.

  Attributes:
    graph: static half of the model that is trained, with its adapters if it has any. It does not
      have the head of a reward model.
    layout: which layers the train state has in stacks.
    params: initial values of the trained parameters, of separate layers.
    frozen: the other parameters, on the mesh in the layout, and in the compute dtype or quantized;
      None if all are trained.
    full_params: function that returns all parameters of the plain model for a train state, of
      separate layers, with adapters merged, and with the head of a reward model. See `lora.merge`
      for quantized kernels.
  """

  graph: nnx.GraphDef
  layout: Layout
  params: Any
  frozen: Any
  full_params: Callable[[TrainState], Any]


def trained_graph(model: ModelConfig, config: FitConfig) -> tuple[nnx.GraphDef, Layout, Params]:
  """Return the static half of the model that is trained, without allocating anything.

  Args:
    model: architecture of the model.
    config: the run's settings.

  Returns:
    The graph; the layout of its parameters in the train state; and the parameters with adapters, of
    separate layers, as ShapeDtypeStructs.

  Raises:
    UserError: if `lora_modules` matches no linear layer.
  """
  if config.lora is None:
    graph, shapes = abstract_model(model, config.dtype)
  else:
    graph, shapes = lora.abstract_model(model, config.lora, config.dtype)
  return *arrange_layers(config.layers, model, graph, shapes), shapes


def divide_model(model: ModelConfig, params: Any, config: FitConfig, mesh: Mesh) -> TrainableModel:
  """Divide a model into trained and frozen parameters, according to `config.lora`.

  Args:
    model: architecture of the model.
    params: its parameters, with a head beside them if it is a reward model (`score_head`).
    config: the run's settings.
    mesh: the devices.

  Raises:
    UserError: if `lora_modules` matches no linear layer, `lora_init` holds other adapters, the
      kernels are not in the format of `base_weights`, or the loss trains a head and there is none,
      or the other way round.
  """
  _check_head(params, config)
  _check_format(params, config)
  adapter_config = config.lora
  graph, layout, _ = trained_graph(model, config)
  if adapter_config is None:
    shardings = param_shardings(params, mesh)

    def separate(state: TrainState) -> Any:
      if not layout.runs:
        return state.eval_params
      return jax.device_put(layout.unstack(state.eval_params), shardings)

    return TrainableModel(graph, layout, params, None, separate)
  trained = _initial_adapters(model, config)
  if HEAD in params:
    params, head = split_head(params)
    trained = join_head(trained, head)
  merge: Callable[[Any, Any], Any] = functools.partial(lora.merge, lora=adapter_config)
  is_full = not has_quantized(params)
  if is_full:  # otherwise there is nothing to compute yet
    merge = jax.jit(merge, out_shardings=param_shardings(params, mesh))
  frozen = place_frozen(params, config, mesh, layout)

  def full_params(state: TrainState) -> Any:
    whole, adapters = params, layout.unstack(state.eval_params)
    if not is_full:  # training has taken over the quantized kernels of `params`
      own = layout.unstack(state.frozen)
      whole = map_params(lambda x, own: own if is_quantized(x) else x, params, own)
    if HEAD not in adapters:
      return merge(whole, adapters)
    adapters, head = split_head(adapters)
    return join_head(merge(whole, adapters), head)

  return TrainableModel(graph, layout, trained, frozen, full_params)


def _initial_adapters(model: ModelConfig, config: FitConfig) -> Any:
  """Return the adapters that training starts from, in the memory of the host."""
  assert config.lora is not None
  if config.lora_init:
    return peft.read_adapters(config.lora_init, model, config.lora, config.section)
  # Every process draws the same adapters. They leave the device because the train state places them
  # on a mesh that may span processes.
  return jax.device_get(lora.init(model, config.lora, jax.random.key(config.seed)))


def _check_head(params: Any, config: FitConfig) -> None:
  """Check that the parameters have a head if, and only if, the loss trains one."""
  head = config.registered_loss.head
  if head is not None and head not in params:
    raise UserError(
      f'The loss {config.loss_name!r} trains a head, and a language model has none. Start from '
      '`reward_model.add_head(lm, seed).lm`, or from what `reward_model.load_start` returns.'
    )
  if head is None and HEAD in params:
    raise UserError(
      f'The model is a reward model, which has no logits, but the loss {config.loss_name!r} needs '
      'a language model. Start from a language model.'
    )


def _check_format(params: Any, config: FitConfig) -> None:
  """Check that the kernels of a model are in the format that the settings name."""
  leaves = jax.tree.leaves(params, is_leaf=is_quantized)
  kinds = {type(x) for x in leaves if is_quantized(x)}
  if AdaptedKernel in kinds:
    raise UserError(
      'This model is the result of training over a quantized base: its adapters stand beside '
      'quantized kernels, and it cannot be trained like this. Save it, and load it again.'
    )
  held = {name for name, kind in FORMATS.items() if kind in kinds} or {FULL}
  if held != {config.base_weights}:
    raise UserError(
      f'The linear layers of the model are in {" and ".join(map(repr, sorted(held)))}, but '
      f'{config.section}.base_weights={config.base_weights!r}. Load the model with '
      f'weights={config.base_weights!r}.'
    )
