"""The interface of losses, and the registry from which `train.loss` selects one."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
from flax import nnx
from jax.sharding import NamedSharding

from cai_jax.runtime.registry import Registry

Batch = dict[str, jax.Array]  # tokens, positions, segment_ids, loss_mask: each i32[B,T]
Sums = dict[str, Any]  # f32[] each, and under ROUTING a `Routing` with a first axis for layers
ROUTING = 'routing'


class LossFunction(Protocol):
  """A function that maps parameters and a batch to a summed loss and its weights."""

  def __call__(
    self,
    graph: nnx.GraphDef,
    params: Any,
    batch: Batch,
    sharding: NamedSharding | None = None,
    remat: str = 'none',
    attention: str = 'xla',
  ) -> tuple[jax.Array, Sums]:
    """Return the summed loss and the sums that it may be divided by.

    Args:
      graph: static half of a `Transformer`, which determines the compute dtype; `nnx.merge(graph,
        params)` is the model.
      params: the model's parameters. The loss is differentiated with respect to them.
      batch: packed rows, each array i32[B,T]: `tokens`; `positions`, from 0 in each segment;
        `segment_ids`, from 1 in each row, where 0 is padding; and `loss_mask`, nonzero on the
        tokens to learn.
      sharding: sharding of the batch's rows, or None on a single device.
      remat: what the backward pass recomputes, a key of `transformer.REMAT`.
      attention: attention implementation, a key of `attention.kernels.kernel.KERNELS`.

    Returns:
      The loss f32[], summed over the batch, and a dict of sums f32[]. The dict has `num_tokens`
      (target tokens, which the log counts) and every sum that the loss's normalizations name. For
      a mixture of experts it may have `ROUTING`, from `Transformer.forward`: the log then shows how
      the experts are used, and `train.balance_loss` can be set.
    """
    ...


@dataclasses.dataclass(frozen=True)
class Loss:
  """A registered loss.

  Attributes:
    function: computes the summed loss and its weights.
    normalizations: for each allowed value of `train.loss_normalization`, the name of the sum that
      divides the loss.
    routes: whether its sums have `ROUTING` for mixtures of experts.
  """

  function: LossFunction
  normalizations: Mapping[str, str]
  routes: bool = False


LOSSES: Registry[Loss] = Registry('loss')


def register_loss(
  name: str, normalizations: Mapping[str, str], routes: bool = False
) -> Callable[[LossFunction], LossFunction]:
  """Return a decorator that registers a loss function.

  Args:
    name: value of `train.loss` that selects the loss.
    normalizations: for each allowed value of `train.loss_normalization`, the name of the sum that
      divides the loss.
    routes: whether its sums have `ROUTING` for mixtures of experts.

  Raises:
    UserError: if the name is taken.
  """

  def register(function: LossFunction) -> LossFunction:
    LOSSES.register(name)(Loss(function, normalizations, routes))
    return function

  return register
