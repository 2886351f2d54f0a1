"""The loss of a reward model: Bradley–Terry on the scores of two responses to one prompt.

A reward model gives each response a score r. In the model of Bradley and Terry (1952), the first
response y_w is better than y_l with the probability σ(r(x, y_w) - r(x, y_l)). The loss is the
cross-entropy of that probability with the label (Ouyang et al. 2022, section 3.5, equation 1). A
label may itself be a probability, as AI feedback is (Bai et al. 2022, section 4.1). Each comparison
counts once, whatever its length.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from cai_jax.data.units import LAST_SEGMENTS
from cai_jax.model.score_head import HEAD, score_states, split_head
from cai_jax.runtime.settings import setting
from cai_jax.runtime.values import convert_fields
from cai_jax.training.losses.comparisons import (
  PREFERENCE_METRICS,
  comparison_mask,
  preference_metrics,
  sides,
  soft_cross_entropy,
)
from cai_jax.training.losses.logprobs import sum_segments
from cai_jax.training.losses.loss import Batch, Sums, add_routing, register_loss
from cai_jax.training.losses.options import check_not_negative
from cai_jax.training.losses.targets import following_segments


@dataclasses.dataclass(frozen=True)
class Reward:
  """Options of `reward`."""

  centering: float = setting(
    0.0, 'Factor of the squared sum of the two scores, which keeps scores near 0.'
  )
  margins: bool = setting(
    False,
    'Whether the score of the first response must exceed that of the second one by the margin that '
    'each comparison then needs.',
  )

  def __post_init__(self):
    convert_fields(self, 'options')
    check_not_negative(self, 'centering')


def _values(settings: Reward) -> tuple[str, ...]:
  """Return the names of the values that comparisons need."""
  return ('probability', 'margin') if settings.margins else ('probability',)


@register_loss(
  'reward',
  normalizations={'comparison': 'num_comparisons'},
  routes=True,
  shares=True,
  units='comparison',
  values=_values,
  settings=Reward,
  head=HEAD,
  metrics=PREFERENCE_METRICS,
)
def reward_loss(
  graph: nnx.GraphDef,
  params: Any,
  batch: Batch,
  sharding: NamedSharding | None = None,
  remat: str = 'none',
  attention: str = 'xla',
  *,
  settings: Reward,
) -> tuple[jax.Array, Sums]:
  """Return the summed loss of the comparisons, and the sums of `preference_metrics`.

  The score of a response is that of the last token of its segment; no logits of the vocabulary are
  computed. `num_tokens` counts the tokens that the loss mask marks.

  The arguments are those of `LossFunction`; `params` has the head beside the decoder's parameters.
  """
  params, head = split_head(params)
  segments = batch['segment_ids']
  hidden, routing = nnx.merge(graph, params).forward(
    batch['tokens'],
    batch['positions'],
    segments,
    sharding=sharding,
    remat=remat,
    attention=attention,
    last_segment_ids=batch.get(LAST_SEGMENTS),
  )
  scores = last_scores(score_states(hidden, head['table'])[..., 0], segments)
  (chosen, rejected), (probability, _) = sides(scores), sides(batch['probability'])
  margin = sides(batch['margin'])[0] if settings.margins else 0.0
  mask = comparison_mask(batch)
  losses = bradley_terry(chosen, rejected, probability, margin, settings.centering)
  sums: Sums = {
    'num_tokens': jnp.sum(batch['loss_mask']).astype(jnp.float32),
    **preference_metrics(chosen, rejected, probability, mask),
  }
  return jnp.sum(losses * mask), add_routing(sums, routing)


def bradley_terry(
  chosen: jax.Array,
  rejected: jax.Array,
  probability: jax.Array,
  margin: jax.Array | float = 0.0,
  centering: float = 0.0,
) -> jax.Array:
  """Return -p log σ(Δ) - (1 - p) log σ(-Δ) + centering · (r_w + r_l)², where Δ = r_w - r_l - m.

  The margin m is that of Touvron et al. 2023 (Llama 2), section 3.2.2, equation 2, for p = 1: r_w
  must exceed r_l by m. For every p, m is the known difference between the quality of the first and
  of the second response, so it is negative if the second one is better. The last term keeps scores
  near 0, since the first two depend only on their difference (Eisenstein et al. 2023, as TRL
  implements it). If the two sides change places, with 1 - p and -m, the loss is the same.

  Args:
    chosen: r_w f32[...], the scores of the first responses.
    rejected: r_l f32[...], those of the second ones.
    probability: p f32[...], the probability that the first one is better.
    margin: m f32[...].
    centering: factor of the last term.

  Returns:
    f32[...], one loss for each comparison.
  """
  loss = soft_cross_entropy(chosen - rejected - margin, probability)
  return loss + centering * jnp.square(chosen + rejected)


def last_scores(scores: jax.Array, segment_ids: jax.Array) -> jax.Array:
  """Return f32[B,T], in column s - 1 the score at the last token of segment s.

  Args:
    scores: f32[B,T], the score at each token.
    segment_ids: i32[B,T], from 1 in each row; 0 is padding.
  """
  following = following_segments(segment_ids)
  return sum_segments(jnp.where(segment_ids != following, scores, 0.0), segment_ids)
