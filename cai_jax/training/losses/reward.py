"""The loss of a reward model: Bradley–Terry on the scores of two responses to one prompt.

A reward model gives each response a score r. In the model of Bradley and Terry (1952), the first
response y_w is better than y_l with the probability σ(r(x, y_w) - r(x, y_l)). The loss is the
cross-entropy of that probability with the label (Ouyang et al. 2022, section 3.5, equation 1). A
label may itself be a probability, as AI feedback is (Bai et al. 2022, section 4.1). Each comparison
counts once, whatever its length.
"""

import jax
import jax.numpy as jnp


def bradley_terry(
  chosen: jax.Array,
  rejected: jax.Array,
  probability: jax.Array,
  margin: jax.Array | float = 0.0,
  centering: float = 0.0,
) -> jax.Array:
  """Return -p log σ(Δ) - (1 - p) log σ(-Δ) + centering · (r_w + r_l)², where Δ = r_w - r_l - m.

  The margin m is that of Touvron et al. 2023 (Llama 2), section 3.2.2, equation 2: the better
  response must lead by it. The last term keeps scores near 0, since the first two depend only on
  their difference (Eisenstein et al. 2023, equation 2). If the two sides change places, with 1 - p
  and -m, the loss is the same.

  Args:
    chosen: r_w f32[...], the scores of the first responses.
    rejected: r_l f32[...], those of the second ones.
    probability: p f32[...], the probability that the first one is better.
    margin: m f32[...].
    centering: factor of the last term.

  Returns:
    f32[...], one loss for each comparison.
  """
  lead = chosen - rejected - margin
  loss = -probability * jax.nn.log_sigmoid(lead) - (1 - probability) * jax.nn.log_sigmoid(-lead)
  return loss + centering * jnp.square(chosen + rejected)


def scores_of_segments(scores: jax.Array, segment_ids: jax.Array) -> jax.Array:
  """Return the score at the last token of each segment.

  Args:
    scores: f32[B,T], the score at each token.
    segment_ids: i32[B,T], from 1 in each row in ascending order; 0 is padding.

  Returns:
    f32[B,T], whose column s - 1 belongs to segment s of the row; 0 where there is no segment.
  """
  following = jnp.roll(segment_ids, -1, axis=1).at[:, -1].set(0)
  is_last = (segment_ids > 0) & (segment_ids != following)
  rows = jnp.arange(scores.shape[0])[:, None]
  # All other tokens go to a column outside the array, which `drop` ignores.
  columns = jnp.where(is_last, segment_ids - 1, scores.shape[1])
  return jnp.zeros_like(scores).at[rows, columns].set(scores, mode='drop')
