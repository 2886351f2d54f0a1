"""The trained parameters of a model: all of them, or low-rank adapters with the rest frozen.

The head of a reward model is trained in both cases, because it starts from random numbers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from cai_jax.model import lora
from cai_jax.model.config import ModelConfig
from cai_jax.model.score_head import HEAD, join_head, split_head
from cai_jax.model.sharding import param_shardings
from cai_jax.model.transformer import abstract_model
from cai_jax.runtime.errors import UserError
from cai_jax.training.fit_config import FitConfig
from cai_jax.training.state import TrainState, place_frozen


@dataclasses.dataclass(frozen=True)
class TrainableModel:
  """A model divided into trained and frozen parameters.

  Attributes:
    graph: static half of the model that is trained, with its adapters if it has any. It does not
      have the head of a reward model.
    params: initial values of the trained parameters.
    frozen: the other parameters, on the mesh in the compute dtype; None if all are trained.
    full_params: function that returns all parameters of the plain model for a train state, with
      adapters merged, and with the head of a reward model.
  """

  graph: nnx.GraphDef
  params: Any
  frozen: Any
  full_params: Callable[[TrainState], Any]


def divide_model(model: ModelConfig, params: Any, config: FitConfig, mesh: Mesh) -> TrainableModel:
  """Divide a model into trained and frozen parameters, according to `config.lora`.

  Args:
    model: architecture of the model.
    params: its parameters, with a head beside them if it is a reward model (`score_head`).
    config: the run's settings.
    mesh: the devices.

  Raises:
    UserError: if `lora_modules` matches no linear layer, or the loss trains a head and there is
      none, or the other way round.
  """
  _check_head(params, config)
  adapter_config = config.lora
  if adapter_config is None:
    graph, _ = abstract_model(model, config.dtype)
    return TrainableModel(graph, params, None, lambda state: state.eval_params)
  graph, _ = lora.abstract_model(model, adapter_config, config.dtype)
  # Every process draws the same adapters. They leave the device because the train state places them
  # on a mesh that may span processes.
  trained = jax.device_get(lora.init(model, adapter_config, jax.random.key(config.seed)))
  if HEAD in params:
    params, head = split_head(params)
    trained = join_head(trained, head)
  merge = jax.jit(
    lambda params, adapters: lora.merge(params, adapters, adapter_config),
    out_shardings=param_shardings(params, mesh),
  )
  frozen = place_frozen(params, config, mesh)

  def full_params(state: TrainState) -> Any:
    if HEAD not in state.eval_params:
      return merge(params, state.eval_params)
    adapters, head = split_head(state.eval_params)
    return join_head(merge(params, adapters), head)

  return TrainableModel(graph, trained, frozen, full_params)


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
