"""How products of hidden states and the output table become logits.

Sampling, likelihoods and losses all use this, so that they compute the same distribution.
"""

from typing import NamedTuple

import jax

from cai_jax.model.config import ModelConfig
from cai_jax.model.elementwise import soft_cap, soft_cap_slope


class LogitTransform(NamedTuple):
  """The divisor and the cap of logits.

  Attributes:
    divisor: the products are divided by it.
    cap: logits become cap · tanh(logit / cap), after the division (Gemma Team 2024, section 2);
      None means no cap.
  """

  divisor: float = 1.0
  cap: float | None = None

  def of_products(self, products: jax.Array) -> jax.Array:
    """Return the logits of products f32[...,V] of hidden states and the output table."""
    logits = products if self.divisor == 1 else products / self.divisor
    return logits if self.cap is None else soft_cap(logits, self.cap)

  def pull_back(self, logits: jax.Array, gradient: jax.Array) -> jax.Array:
    """Return the gradient by the products.

    Args:
      logits: what `of_products` returned.
      gradient: the gradient by the logits.
    """
    if self.cap is not None:
      gradient = gradient * soft_cap_slope(logits, self.cap)
    return gradient if self.divisor == 1 else gradient / self.divisor


PLAIN = LogitTransform()


def logit_transform_of(config: ModelConfig) -> LogitTransform:
  """Return the divisor and the cap of a model's logits.

  Args:
    config: the shape of the model.
  """
  return LogitTransform(config.logit_divisor, config.logit_cap)
