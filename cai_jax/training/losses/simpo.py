"""SimPO: mean log-probabilities as rewards, without a reference (Meng et al. 2024).

The reward of a response is β/|y| log π(y | x; θ), equation 4 of the paper, and the loss of a
comparison is equation 6,

  -log σ(β/|y_w| log π(y_w | x; θ) - β/|y_l| log π(y_l | x; θ) - γ),

where y_w is the chosen and y_l the rejected response, and γ is the margin by which the chosen one
must lead. The loss of a soft label is the mean of the losses of both hard labels, weighted by its
probability.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from cai_jax.runtime.settings import setting
from cai_jax.runtime.values import convert_fields
from cai_jax.training.losses.comparisons import (
  PREFERENCE_METRICS,
  comparison_mask,
  preference_metrics,
  sides,
)
from cai_jax.training.losses.logprobs import sequence_logprobs
from cai_jax.training.losses.loss import Batch, Sums, add_routing, register_loss
from cai_jax.training.losses.options import check_not_negative, check_positive


@dataclasses.dataclass(frozen=True)
class SimPO:
  """Options of `simpo`."""

  beta: float = setting(2.0, 'β, the scale of the rewards.')
  gamma: float = setting(1.0, 'γ, the margin between the rewards; the paper has γ/β in [0, 1.6].')

  def __post_init__(self):
    convert_fields(self, 'options')
    check_positive(self, 'beta')
    check_not_negative(self, 'gamma')


@register_loss(
  'simpo',
  normalizations={'comparison': 'num_comparisons'},
  routes=True,
  shares=True,
  units='comparison',
  values=('probability',),
  settings=SimPO,
  metrics=PREFERENCE_METRICS,
)
def simpo(
  graph: nnx.GraphDef,
  params: Any,
  batch: Batch,
  sharding: NamedSharding | None = None,
  remat: str = 'none',
  attention: str = 'xla',
  *,
  settings: SimPO,
) -> tuple[jax.Array, Sums]:
  """Return the loss and the sums of a batch, those of `preference_metrics`.

  The arguments are those of `LossFunction`.
  """
  logprobs = sequence_logprobs(nnx.merge(graph, params), batch, sharding, remat, attention)
  mask = comparison_mask(batch)
  chosen, rejected = sides(settings.beta * logprobs.sums / jnp.maximum(logprobs.counts, 1.0))
  probability, _ = sides(batch['probability'])
  wins = probability * jax.nn.log_sigmoid(chosen - rejected - settings.gamma)
  losses = (1 - probability) * jax.nn.log_sigmoid(rejected - chosen - settings.gamma)
  sums: Sums = {
    'num_tokens': jnp.sum(logprobs.counts),
    **preference_metrics(chosen, rejected, probability, mask),
  }
  return -jnp.sum((wins + losses) * mask), add_routing(sums, logprobs.routing)
