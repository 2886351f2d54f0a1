"""Direct preference optimization (Rafailov et al. 2023) and three relatives.

All of them are functions of the difference of two log-ratios,

  h = r(y_w) - r(y_l),   r(y) = log π(y | x; θ) - log π_ref(y | x),

where y_w is the chosen and y_l the rejected response, and β r(y) is the implicit reward of y
(equation 5, up to a term that depends on x alone). With `length_normalized`, r(y) is divided by the
number of tokens of y (Lambert et al. 2024, Tülu 3, section 5.1.2).

  dpo         -w log σ(βh) - (1 - w) log σ(-βh), which is equation 7 for w = 1.
  robust_dpo  the same form, with weights that correct for labels of which a share ε is flipped
              (Chowdhury et al. 2024; the number of its equation is unverified).
  ipo         w (h - 1/(2β))² + (1 - w) (h + 1/(2β))² (Azar et al. 2024, equation 17, for w = 1),
              where β is the τ of the paper.

Labels may be soft: p is the probability that y_w is better. The loss of a soft label is the mean of
the losses of both hard labels, so w = p. In `dpo`, `label_smoothing` ε makes that
w = (1 - ε) p + ε (1 - p): the conservative DPO of Mitchell 2023. In `robust_dpo`, a label that was
flipped with probability ε gives an unbiased estimate of the loss of the true label with
w = (p - ε) / (1 - 2ε), which may be negative.
"""

import dataclasses
from collections.abc import Callable
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
from cai_jax.training.losses.options import check_positive, check_share_of_labels

BETA = 'β, the strength of the pull toward the reference model.'
LENGTH_NORMALIZED = 'Whether a log-ratio is divided by the number of tokens of its response.'


@dataclasses.dataclass(frozen=True)
class IPO:
  """Options of `ipo`."""

  beta: float = setting(0.1, BETA)
  length_normalized: bool = setting(False, LENGTH_NORMALIZED)

  def __post_init__(self):
    convert_fields(self, 'options')
    check_positive(self, 'beta')


@dataclasses.dataclass(frozen=True)
class DPO:
  """Options of `dpo`."""

  beta: float = setting(0.1, BETA)
  length_normalized: bool = setting(False, LENGTH_NORMALIZED)
  label_smoothing: float = setting(
    0.0, 'ε in [0, 0.5): share of labels that are assumed to be wrong, which softens every label.'
  )

  def __post_init__(self):
    convert_fields(self, 'options')
    check_positive(self, 'beta')
    check_share_of_labels(self, 'label_smoothing')


@dataclasses.dataclass(frozen=True)
class RobustDPO:
  """Options of `robust_dpo`."""

  beta: float = setting(0.1, BETA)
  length_normalized: bool = setting(False, LENGTH_NORMALIZED)
  flip_rate: float = setting(0.1, 'ε in [0, 0.5): share of the labels that are flipped.')

  def __post_init__(self):
    convert_fields(self, 'options')
    check_positive(self, 'beta')
    check_share_of_labels(self, 'flip_rate')


Options = DPO | RobustDPO | IPO

# A function of h, the weights w of the chosen side, and the options: the loss of each comparison.
Penalty = Callable[[jax.Array, jax.Array, Any], jax.Array]


def _register(name: str, options: type) -> Callable[[Penalty], Penalty]:
  """Return a decorator that registers a loss of log-ratio differences."""

  def register(penalty: Penalty) -> Penalty:
    @register_loss(
      name,
      normalizations={'comparison': 'num_comparisons'},
      routes=True,
      shares=True,
      units='comparison',
      values=('probability',),
      settings=options,
      needs_reference=True,
      metrics=PREFERENCE_METRICS
      | dict.fromkeys(('chosen_log_ratio', 'rejected_log_ratio'), 'num_comparisons'),
    )
    def loss(
      graph: nnx.GraphDef,
      params: Any,
      batch: Batch,
      sharding: NamedSharding | None = None,
      remat: str = 'none',
      attention: str = 'xla',
      *,
      settings: Options,
    ) -> tuple[jax.Array, Sums]:
      model = nnx.merge(graph, params)
      logprobs = sequence_logprobs(model, batch, sharding, remat, attention)
      return _compare(penalty, logprobs, batch, settings)

    return penalty

  return register


def _compare(penalty: Penalty, logprobs, batch: Batch, settings: Options) -> tuple[jax.Array, Sums]:
  """Return the loss of a batch and its sums."""
  mask = comparison_mask(batch)
  ratios = logprobs.sums - batch['reference']
  scores = ratios / jnp.maximum(logprobs.counts, 1.0) if settings.length_normalized else ratios
  chosen, rejected = sides(scores)
  probability, _ = sides(batch['probability'])
  losses = penalty(chosen - rejected, probability, settings)
  chosen_ratio, rejected_ratio = sides(ratios)
  sums: Sums = {
    'num_tokens': jnp.sum(logprobs.counts),
    **preference_metrics(settings.beta * chosen, settings.beta * rejected, probability, mask),
    'chosen_log_ratio': jnp.sum(chosen_ratio * mask),
    'rejected_log_ratio': jnp.sum(rejected_ratio * mask),
  }
  return jnp.sum(losses * mask), add_routing(sums, logprobs.routing)


@_register('dpo', DPO)
def dpo(h: jax.Array, probability: jax.Array, options: DPO) -> jax.Array:
  """Return the loss of each comparison, with conservative labels."""
  smoothing = options.label_smoothing
  w = (1 - smoothing) * probability + smoothing * (1 - probability)
  return soft_cross_entropy(options.beta * h, w)


@_register('robust_dpo', RobustDPO)
def robust_dpo(h: jax.Array, probability: jax.Array, options: RobustDPO) -> jax.Array:
  """Return the loss of each comparison, an unbiased estimate for flipped labels."""
  w = (probability - options.flip_rate) / (1 - 2 * options.flip_rate)
  return soft_cross_entropy(options.beta * h, w)


@_register('ipo', IPO)
def ipo(h: jax.Array, probability: jax.Array, options: IPO) -> jax.Array:
  """Return the squared distance of each difference of log-ratios from 1 / (2β)."""
  target = 1 / (2 * options.beta)
  return probability * (h - target) ** 2 + (1 - probability) * (h + target) ** 2
