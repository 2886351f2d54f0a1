"""What losses over comparisons share: the two sides of each comparison, and common metrics."""

import jax
import jax.numpy as jnp

from cai_jax.training.losses.loss import Batch, Sums


def sides(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Return the columns f32[B,T//2] of the first and of the second segment of each unit.

  In comparisons these are the chosen and the rejected response.

  Args:
    x: f32[B,T], column s - 1 belongs to segment s of the row. The two segments of a unit stand in
      adjacent columns, the chosen one first.
  """
  pairs = x[:, : x.shape[1] // 2 * 2].reshape(x.shape[0], -1, 2)
  return pairs[..., 0], pairs[..., 1]


def comparison_mask(batch: Batch) -> jax.Array:
  """Return f32[B,T//2], 1 in the columns that hold a comparison."""
  segments = batch['segment_ids']
  count = jnp.max(segments, axis=1, keepdims=True) // 2
  return (jnp.arange(segments.shape[1] // 2) < count).astype(jnp.float32)


def soft_cross_entropy(logits: jax.Array, probability: jax.Array) -> jax.Array:
  """Return -p log σ(a) - (1 - p) log σ(-a), f32[...].

  Args:
    logits: a f32[...].
    probability: p f32[...], the weight of the first term; it may lie outside [0, 1].
  """
  log_sigmoid = jax.nn.log_sigmoid
  return -probability * log_sigmoid(logits) - (1 - probability) * log_sigmoid(-logits)


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
    probably better has the higher score, where equal scores or a probability of 1/2 count half;
    `margin`, the sum of the differences; `chosen_reward` and `rejected_reward`, the sums of both
    scores.
  """
  agree = (jnp.sign(chosen - rejected) * jnp.sign(probability - 0.5) + 1) / 2
  return {
    'num_comparisons': jnp.sum(mask),
    'accuracy': jnp.sum(agree * mask),
    'margin': jnp.sum((chosen - rejected) * mask),
    'chosen_reward': jnp.sum(chosen * mask),
    'rejected_reward': jnp.sum(rejected * mask),
  }


# What `register_loss` needs to know about the sums of `preference_metrics`.
PREFERENCE_METRICS = dict.fromkeys(
  ('accuracy', 'margin', 'chosen_reward', 'rejected_reward'), 'num_comparisons'
)
