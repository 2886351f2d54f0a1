"""How products of queries and keys become attention scores."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cai_jax.model.config import ModelConfig
from cai_jax.model.elementwise import soft_cap, soft_cap_slope


class Scores(NamedTuple):
  """The scale and the cap of attention scores, in every implementation of attention.

  Attributes:
    scale: factor of the product of a query and a key; None means head_dim^-1/2.
    cap: scores become cap · tanh(score / cap) (Gemma Team 2024, section 2); None means no cap.
  """

  scale: float | None = None
  cap: float | None = None

  def factor(self, head_dim: int) -> float:
    """Return the factor of the products."""
    return head_dim**-0.5 if self.scale is None else self.scale

  def of_products(self, products: jax.Array, head_dim: int) -> jax.Array:
    """Return the scores, before masking.

    Args:
      products: f32[...], of queries and keys.
      head_dim: size of a head.
    """
    scores = products * self.factor(head_dim)
    return scores if self.cap is None else soft_cap(scores, self.cap)

  def pull_back(self, scores: jax.Array, gradient: jax.Array, head_dim: int) -> jax.Array:
    """Return the gradient by the products.

    Args:
      scores: what `of_products` returned, or less where a key is masked and the gradient is 0.
      gradient: the gradient by the scores.
      head_dim: size of a head.
    """
    if self.cap is not None:
      gradient = gradient * soft_cap_slope(jnp.maximum(scores, -self.cap), self.cap)
    return gradient * self.factor(head_dim)


PLAIN = Scores()


def scores_of(config: ModelConfig) -> Scores:
  """Return the scale and the cap of a model's attention scores.

  Args:
    config: the shape of the model.
  """
  return Scores(config.query_scale, config.attention_cap)
