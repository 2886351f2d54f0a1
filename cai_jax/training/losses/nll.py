"""The supervised loss: negative log-likelihood of the target tokens.

With the normalization 'sequence', the loss is L(θ) = -1/N Σ_i log P(y_i | x_i; θ) over N sequences,
as in the objective of Constitutional AI. The normalization 'token' divides the same sum by the
number of target tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from cai_jax.training.losses.cross_entropy import choose_num_slices, weighted_cross_entropy
from cai_jax.training.losses.local_rows import to_local_rows
from cai_jax.training.losses.loss import Batch, Sums, add_routing, register_loss
from cai_jax.training.losses.targets import count_sequences, next_token_targets


@register_loss(
  'nll', normalizations={'sequence': 'num_sequences', 'token': 'num_tokens'}, routes=True
)
def negative_log_likelihood(
  graph: nnx.GraphDef,
  params: Any,
  batch: Batch,
  sharding: NamedSharding | None = None,
  remat: str = 'none',
  attention: str = 'xla',
) -> tuple[jax.Array, Sums]:
  """Return -Σ log P over the target tokens, and the numbers of target tokens and sequences.

  For a mixture of experts, the sums also have `ROUTING`.

  The arguments are those of `LossFunction`.
  """
  model = nnx.merge(graph, params)
  hidden, routing = model.forward(
    batch['tokens'],
    batch['positions'],
    batch['segment_ids'],
    sharding=sharding,
    remat=remat,
    attention=attention,
  )
  targets, weights = next_token_targets(batch)
  sums: Sums = {
    'num_tokens': jnp.sum(weights),
    'num_sequences': count_sequences(batch['segment_ids'], weights),
  }
  hidden, targets, weights = (to_local_rows(x, sharding) for x in (hidden, targets, weights))
  rows, length = targets.shape
  num_slices = choose_num_slices(rows, length, model.config.vocab_size, sharding)
  loss = weighted_cross_entropy(
    num_slices, hidden, model.output_table, targets, weights, model.logit_transform
  )
  return loss, add_routing(sums, routing)
