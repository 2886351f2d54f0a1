"""KTO: responses that were judged one by one (Ethayarajh et al. 2024).

With r(x, y) = log π(y | x; θ) - log π_ref(y | x), the loss of a response is λ_y - v(x, y), equation
7 of the paper, where

  v = λ_D σ(β (r - z))   if the response is desirable, and
  v = λ_U σ(β (z - r))   if it is not.

The reference point z estimates the divergence of the policy from the reference: max(0, the mean of
r(x, y') over the whole batch), where y' is a response to another prompt. No gradient flows into z.
A unit therefore has two segments, the judged response and the other one, both after its prompt.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from cai_jax.runtime.settings import setting
from cai_jax.runtime.values import convert_fields
from cai_jax.training.losses.comparisons import comparison_mask, sides
from cai_jax.training.losses.logprobs import sequence_logprobs
from cai_jax.training.losses.loss import Batch, Sums, add_routing, register_loss, whole_of
from cai_jax.training.losses.options import check_positive


@dataclasses.dataclass(frozen=True)
class KTO:
  """Options of `kto`."""

  beta: float = setting(0.1, 'β, the strength of the pull toward the reference model.')
  desirable_weight: float = setting(1.0, 'λ_D, the weight of desirable responses.')
  undesirable_weight: float = setting(
    1.0,
    'λ_U, the weight of undesirable responses. With n_D and n_U responses of each kind, the paper '
    'recommends λ_D n_D / (λ_U n_U) between 1 and 3/2.',
  )

  def __post_init__(self):
    convert_fields(self, 'options')
    check_positive(self, *(field.name for field in dataclasses.fields(self)))


@register_loss(
  'kto',
  normalizations={'judged': 'num_judged'},
  routes=True,
  shares=True,
  units='judged',
  values=('desirable',),
  settings=KTO,
  needs_reference=True,
  needs_whole=True,
  metrics={
    'desirable_reward': 'num_desirable',
    'undesirable_reward': 'num_undesirable',
    'mismatched_log_ratio': 'num_judged',
  },
)
def kto(
  graph: nnx.GraphDef,
  params: Any,
  batch: Batch,
  sharding: NamedSharding | None = None,
  remat: str = 'none',
  attention: str = 'xla',
  *,
  settings: KTO,
  whole: Sums | None = None,
) -> tuple[jax.Array, Sums]:
  """Return the loss and the sums of a batch.

  The sums are the numbers of responses (`num_judged`, `num_desirable`, `num_undesirable`), the
  rewards β r of either kind, and `mismatched_log_ratio`, whose mean is z if it is positive.

  The arguments are those of `LossFunction`.
  """
  logprobs = sequence_logprobs(nnx.merge(graph, params), batch, sharding, remat, attention)
  mask = comparison_mask(batch)
  ratio, mismatched = sides(logprobs.sums - batch['reference'])
  desirable = sides(batch['desirable'])[0] * mask
  undesirable = mask - desirable
  sums: Sums = {
    'num_tokens': jnp.sum(logprobs.counts),
    'num_judged': jnp.sum(mask),
    'num_desirable': jnp.sum(desirable),
    'num_undesirable': jnp.sum(undesirable),
    'desirable_reward': settings.beta * jnp.sum(ratio * desirable),
    'undesirable_reward': settings.beta * jnp.sum(ratio * undesirable),
    'mismatched_log_ratio': jnp.sum(mismatched * mask),
  }
  sums = add_routing(sums, logprobs.routing)
  of_all = whole_of(whole, sums)
  z = jnp.maximum(of_all['mismatched_log_ratio'] / jnp.maximum(of_all['num_judged'], 1.0), 0.0)
  logit = settings.beta * (ratio - z)
  weights = settings.desirable_weight * desirable, settings.undesirable_weight * undesirable
  # 1 - σ(x) = σ(-x), without the loss of digits.
  loss = weights[0] * jax.nn.sigmoid(-logit) + weights[1] * jax.nn.sigmoid(logit)
  return jnp.sum(loss), sums
