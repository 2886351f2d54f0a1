"""The interface of losses, and the registry in which `train.loss` and `prefer.objective` look."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from cai_jax.data.units import SEGMENTS
from cai_jax.model.experts import Routing
from cai_jax.runtime.registry import Registry

# tokens, positions, segment_ids, loss_mask: each i32[B,T]; and the units' values, each f32[B,T]
Batch = dict[str, jax.Array]
Sums = dict[str, Any]  # f32[] each, and under ROUTING a `Routing` with a first axis for layers
ROUTING = 'routing'
F = TypeVar('F', bound=Callable[..., Any])


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
    **extra: Any,
  ) -> tuple[jax.Array, Sums]:
    """Return the summed loss and the sums that it may be divided by.

    Args:
      graph: static half of a `Transformer`, which determines the compute dtype; `nnx.merge(graph,
        params)` is the model.
      params: the model's parameters. The loss is differentiated with respect to them.
      batch: packed rows, each array i32[B,T]: `tokens`; `positions`, from 0 in each segment;
        `segment_ids`, from 1 in each row, where 0 is padding; and `loss_mask`, nonzero on the
        tokens to learn. For each value of the units also f32[B,T], whose column s - 1 belongs to
        segment s. If segments share tokens, also `last_segment_ids`; see `packing.Batches`.
      sharding: sharding of the batch's rows, or None on a single device.
      remat: what the backward pass recomputes, a key of `transformer.REMAT`.
      attention: attention implementation, a key of `attention.kernels.kernel.KERNELS`.
      extra: only what the loss was registered for. `settings`: an instance of its settings class.
        `whole`: the sums of the whole batch, of which `batch` may be a part, or None if they are
        those that the loss returns itself. No gradient may flow into them; see `whole_of`.

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
      divides the loss. Preference objectives are divided by the first one.
    routes: whether its sums have `ROUTING` for mixtures of experts.
    units: the kind of unit that it trains on, a key of `units.SEGMENTS`.
    values: names of the units' values that it reads; or a function from its settings to these
      names, if they depend on the settings.
    settings: frozen dataclass of its own settings, an instance of which it gets as `settings`; None
      if it has none.
    needs_reference: whether it reads 'reference' of the batch, the log-probability of each segment
      under the reference model. `training/reference.py` computes these before training.
    needs_whole: whether it gets the sums of the whole batch as `whole`.
    head: name of a head beside the language model that it trains, such as 'score'; None if it
      trains the language model itself.
    shares: whether it gives `last_segment_ids` of the batch, if there are any, to the model. Only
      then may segments share the tokens of their prompt.
    metrics: name of a sum → name of the sum that divides it. The log shows the quotient in its
      place; other sums are shown as they are.
  """

  function: LossFunction
  normalizations: Mapping[str, str]
  routes: bool = False
  units: str = 'sequence'
  values: tuple[str, ...] | Callable[[Any], tuple[str, ...]] = ()
  settings: type | None = None
  needs_reference: bool = False
  needs_whole: bool = False
  head: str | None = None
  shares: bool = False
  metrics: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def needed_values(self, settings: Any) -> tuple[str, ...]:
    """Return the names of the units' values that the loss reads, apart from 'reference'.

    Args:
      settings: an instance of its settings class, or None if it has none.
    """
    return self.values(settings) if callable(self.values) else self.values

  def averages(self, sums: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sums as the log shows them: metrics divided by their weights.

    Args:
      sums: sums of a whole batch, or of several, without `ROUTING`.
    """
    shown = dict(sums)
    for name, weight in self.metrics.items():
      shown[name] = sums[name] / jnp.maximum(sums[weight], 1.0)
    return shown


LOSSES: Registry[Loss] = Registry('loss')


def register_loss(
  name: str, normalizations: Mapping[str, str], routes: bool = False, **properties: Any
) -> Callable[[F], F]:
  """Return a decorator that registers a loss function.

  Args:
    name: value of `train.loss` or `prefer.objective` that selects the loss.
    normalizations: for each allowed value of `train.loss_normalization`, the name of the sum that
      divides the loss.
    routes: whether its sums have `ROUTING` for mixtures of experts.
    properties: other attributes of `Loss`.

  Raises:
    UserError: if the name is taken.
    ValueError: if there is no such kind of unit.
  """

  def register(function: F) -> F:
    loss = Loss(function, normalizations, routes, **properties)
    if loss.units not in SEGMENTS:
      raise ValueError(f'units={loss.units!r} must be one of {tuple(SEGMENTS)}.')
    LOSSES.register(name)(loss)
    return function

  return register


def add_routing(sums: Sums, routing: Routing | None) -> Sums:
  """Return the sums of a loss with the routing of experts, if the model has experts.

  Args:
    sums: the other sums.
    routing: what `Transformer.forward` returns; None for a dense model.
  """
  return sums if routing is None else {**sums, ROUTING: routing}


def whole_of(whole: Sums | None, sums: Sums) -> Sums:
  """Return the sums of the whole batch, into which no gradient flows.

  Args:
    whole: the `whole` that a loss received.
    sums: the sums that the loss returns.
  """
  return jax.lax.stop_gradient(sums if whole is None else whole)
