"""The load-balancing loss of mixtures of experts, and measures of how evenly experts are used."""

import jax
import jax.numpy as jnp

from cai_jax.model.experts import Routing
from cai_jax.training.losses.loss import ROUTING, Sums


def balance_loss(whole: Routing, part: Routing) -> jax.Array:
  """Return a part's share f32[] of the load-balancing loss E · Σ_e f_e · P_e of a whole batch.

  f_e is the mean number of times that a token goes to expert e, which is 0 or 1 in each layer, and
  P_e the mean probability that the router gives it. Both means are over all tokens of the batch and
  all layers with experts together: prompts count as much as responses, padding does not count.
  This is Fedus et al. 2021 (Switch Transformers), equations 4 to 6, in the form of
  `load_balancing_loss_func` of transformers. It differs from the paper in two points: a token goes
  to k experts, so that even routing gives k instead of 1; and the means of all layers are taken
  before they are multiplied, where the paper has a loss for each layer.

  Only P_e is differentiable. The parts of a batch add up to the loss of the batch, and so do their
  gradients, because each part is multiplied with the f_e of the whole.

  Args:
    whole: the routing of the whole batch in L layers: counts i32[L,E]. No gradient flows into it.
    part: the routing of the part.
  """
  whole = jax.lax.stop_gradient(whole)
  tokens = jnp.maximum(whole.tokens.sum(), 1).astype(jnp.float32)
  shares = whole.counts.sum(0) / tokens
  probabilities = part.probabilities.sum(0) / tokens
  return shares.shape[0] * jnp.sum(shares * probabilities)


def usage_metrics(routing: Routing) -> dict[str, jax.Array]:
  """Return how evenly a batch uses the experts.

  Args:
    routing: the routing of the batch in L layers: counts i32[L,E].

  Returns:
    `expert_balance` f32[], the load-balancing loss, which is k if all experts are used alike; and
    `busiest_expert` f32[], the largest share of a layer's tokens that one expert computes.
  """
  tokens = jnp.maximum(routing.tokens, 1)[:, None]
  return {
    'expert_balance': balance_loss(routing, routing),
    'busiest_expert': jnp.max(routing.counts / tokens),
  }


def split_routing(sums: Sums) -> tuple[Sums, Routing | None]:
  """Return the sums f32[] of a loss, and the routing of experts, if there is any."""
  return {name: x for name, x in sums.items() if name != ROUTING}, sums.get(ROUTING)
