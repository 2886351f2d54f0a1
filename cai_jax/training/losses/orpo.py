"""ORPO: imitation of the chosen response and an odds ratio, without a reference (Hong et al. 2024).

Section 4 of the paper defines P(y | x) by the mean log-probability of a token, log P(y | x) =
1/|y| Σ_t log π(y_t | x, y_<t; θ), and its odds as P / (1 - P). The loss of a comparison is

  -log P(y_w | x) - λ log σ(log odds(y_w | x) - log odds(y_l | x)),

equation 6 with equation 7 in it, where y_w is the chosen and y_l the rejected response. The loss of
a soft label is the mean of the losses of both hard labels, weighted by its probability.
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
  soft_cross_entropy,
)
from cai_jax.training.losses.logprobs import sequence_logprobs
from cai_jax.training.losses.loss import Batch, Sums, add_routing, register_loss
from cai_jax.training.losses.options import check_positive

# The greatest log P whose odds are computed: nearer to 0, they have few correct digits in f32, and
# at 0 they are infinite. Above it, the odds have no gradient, and the imitation still has one.
MOST_LOG_P = -1e-6


@dataclasses.dataclass(frozen=True)
class ORPO:
  """Options of `orpo`."""

  weight: float = setting(0.1, 'λ, the weight of the odds ratio beside the imitation.')

  def __post_init__(self):
    convert_fields(self, 'options')
    check_positive(self, 'weight')


@register_loss(
  'orpo',
  normalizations={'comparison': 'num_comparisons'},
  routes=True,
  shares=True,
  units='comparison',
  values=('probability',),
  settings=ORPO,
  metrics=PREFERENCE_METRICS | {'nll': 'num_comparisons', 'log_odds_ratio': 'num_comparisons'},
)
def orpo(
  graph: nnx.GraphDef,
  params: Any,
  batch: Batch,
  sharding: NamedSharding | None = None,
  remat: str = 'none',
  attention: str = 'xla',
  *,
  settings: ORPO,
) -> tuple[jax.Array, Sums]:
  """Return the loss and the sums of a batch.

  Besides those of `preference_metrics`, in which log P(y | x) is the reward of y, these are `nll`,
  the loss of the imitation alone, and `log_odds_ratio`.

  The arguments are those of `LossFunction`.
  """
  logprobs = sequence_logprobs(nnx.merge(graph, params), batch, sharding, remat, attention)
  mask = comparison_mask(batch)
  chosen, rejected = sides(logprobs.sums / jnp.maximum(logprobs.counts, 1.0))
  probability, _ = sides(batch['probability'])
  nll = -probability * chosen - (1 - probability) * rejected
  ratio = _log_odds(chosen) - _log_odds(rejected)
  losses = nll + settings.weight * soft_cross_entropy(ratio, probability)
  sums: Sums = {
    'num_tokens': jnp.sum(logprobs.counts),
    **preference_metrics(chosen, rejected, probability, mask),
    'nll': jnp.sum(nll * mask),
    'log_odds_ratio': jnp.sum(ratio * mask),
  }
  return jnp.sum(losses * mask), add_routing(sums, logprobs.routing)


def _log_odds(log_p: jax.Array) -> jax.Array:
  """Return log(P / (1 - P)) of log P, which is at most 0; of columns without a response, anything.

  Args:
    log_p: f32[B,P].
  """
  log_p = jnp.minimum(log_p, MOST_LOG_P)
  return log_p - jax.nn.log1mexp(-log_p)
