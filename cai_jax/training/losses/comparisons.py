"""What losses over comparisons share: the two sides of each comparison, and common metrics."""

import jax
import jax.numpy as jnp

from cai_jax.training.losses.loss import Batch, Sums


def sides(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Return the columns f32[B,T//2] of the chosen and of the rejected responses.

  Args:
    x: f32[B,T], column s - 1 belongs to segment s of the row. The segments of a comparison follow
      each other, the chosen one first.
  """
  pairs = x[:, : x.shape[1] // 2 * 2].reshape(x.shape[0], -1, 2)
  return pairs[..., 0], pairs[..., 1]


def comparison_mask(batch: Batch) -> jax.Array:
  """Return f32[B,T//2], 1 in the columns that hold a comparison."""
  segments = batch['segment_ids']
  count = jnp.max(segments, axis=1, keepdims=True) // 2
  return (jnp.arange(segments.shape[1] // 2) < count).astype(jnp.float32)


def preference_metrics(
  chosen: jax.Array, rejected: jax.Array, probability: jax.Array, mask: jax.Array
) -> Sums:
  """Return the sums of common metrics of scores, such as rewards, f32[] each.

  Args:
    chosen: scores f32[B,P] of the chosen responses.
    rejected: scores f32[B,P] of the rejected responses.
    probability: f32[B,P], that the chosen response is better.
    mask: f32[B,P], 1 for each comparison.

  Returns:
    `num_comparisons`; `accuracy`, the number of comparisons in which the response that is more
    probably better has the higher score, where a probability of 1/2 counts half; `margin`, the sum
    of the differences; `chosen_reward` and `rejected_reward`, the sums of both scores.
  """
  agree = (chosen - rejected) * (probability - 0.5) > 0
  return {
    'num_comparisons': jnp.sum(mask),
    'accuracy': jnp.sum(jnp.where(probability == 0.5, 0.5, agree) * mask),
    'margin': jnp.sum((chosen - rejected) * mask),
    'chosen_reward': jnp.sum(chosen * mask),
    'rejected_reward': jnp.sum(rejected * mask),
  }


# What `register_loss` needs to know about the sums of `preference_metrics`.
PREFERENCE_METRICS = dict.fromkeys(
  ('accuracy', 'margin', 'chosen_reward', 'rejected_reward'), 'num_comparisons'
)
