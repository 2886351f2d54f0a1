"""Log-probabilities of target tokens and of whole sequences, without holding all logits at once.

Preference objectives compare log P(y | x; θ) of whole responses, so the weight of a token in the
gradient is known only after the log-probabilities of all of them. `token_logprobs` therefore
computes the logits of a slice twice: in the forward pass for the log-probabilities, and in the
backward pass for the gradient, where `sliced_cross_entropy` takes the cotangents as weights.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from cai_jax.data.units import LAST_SEGMENTS
from cai_jax.model.experts import Routing
from cai_jax.model.logits import PLAIN, LogitTransform
from cai_jax.model.precision import einsum_f32
from cai_jax.model.transformer import Transformer
from cai_jax.training.losses.cross_entropy import (
  arrange,
  choose_num_slices,
  front_order,
  sliced_cross_entropy,
  slices_needed,
)
from cai_jax.training.losses.local_rows import from_local_rows, to_local_rows
from cai_jax.training.losses.loss import Batch
from cai_jax.training.losses.targets import next_token_targets


class SequenceLogProbs(NamedTuple):
  """The log-probabilities of the segments of a batch.

  Attributes:
    sums: f32[B,T], in column s - 1 the sum of the log-probabilities of the targets of segment s.
    counts: f32[B,T], in column s - 1 the number of these targets.
    routing: how each layer of experts has divided all tokens; None for a dense model.
  """

  sums: jax.Array
  counts: jax.Array
  routing: Routing | None


def sequence_logprobs(
  model: Transformer,
  batch: Batch,
  sharding: NamedSharding | None = None,
  remat: str = 'none',
  attention: str = 'xla',
) -> SequenceLogProbs:
  """Return log P(y | x; θ) of each segment, where y are its targets; see `next_token_targets`.

  Args:
    model: the model; `nnx.merge(graph, params)` in a loss.
    batch: a packed batch.
    sharding: sharding of the batch's rows, or None on a single device.
    remat: what the backward pass recomputes, a key of `transformer.REMAT`.
    attention: attention implementation, a key of `attention.kernels.kernel.KERNELS`.
  """
  segments = batch['segment_ids']
  hidden, routing = model.forward(
    batch['tokens'],
    batch['positions'],
    segments,
    sharding=sharding,
    remat=remat,
    attention=attention,
    last_segment_ids=batch.get(LAST_SEGMENTS),
  )
  targets, weights = next_token_targets(batch)
  local = [to_local_rows(x, sharding) for x in (hidden, targets, weights)]
  rows, length = local[1].shape
  num_slices = choose_num_slices(rows, length, model.config.vocab_size, sharding)
  hidden, *others = local
  logprobs = token_logprobs(num_slices, hidden, model.output_table, *others, model.logit_transform)
  logprobs = from_local_rows(logprobs, sharding)
  return SequenceLogProbs(
    sum_segments(logprobs, segments), sum_segments(weights, segments), routing
  )


def sum_segments(x: jax.Array, segment_ids: jax.Array) -> jax.Array:
  """Return f32[B,T], in column s - 1 the sum of x over segment s.

  Args:
    x: f32[B,T].
    segment_ids: i32[B,T], from 1 in each row; 0 is padding.
  """
  length = segment_ids.shape[1]
  add = functools.partial(jax.ops.segment_sum, num_segments=length + 1)
  return jax.vmap(add)(x, segment_ids)[:, 1:]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def token_logprobs(
  num_slices: int,
  hidden: jax.Array,
  table: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  transform: LogitTransform = PLAIN,
) -> jax.Array:
  """Return weights × log softmax(transform(hidden · tableᵀ))[targets], f32[B,T].

  The function is differentiable in `hidden` and `table`. As `weighted_cross_entropy`, it skips
  slices of positions without weight.

  Args:
    num_slices: number of slices of the positions of a row, which are processed one after the other.
    hidden: [B,T,D], in the dtype that the logits are computed from.
    table: [V,D], the output layer.
    targets: i32[B,T].
    weights: f32[B,T], 0 at positions that are no targets.
    transform: divisor and cap of the logits.
  """
  length = hidden.shape[1]
  size = -(-length // num_slices)
  order = front_order(weights)
  arranged = [arrange(x, order, num_slices) for x in (hidden, targets, weights)]
  matrix = table.astype(hidden.dtype)

  def add_slice(number, logprobs):
    x, target, weight = (
      jax.lax.dynamic_slice_in_dim(a, number * size, size, axis=1) for a in arranged
    )
    logits = transform.of_products(einsum_f32('BTD,VD->BTV', x, matrix))
    target_logits = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    part = (target_logits - jax.nn.logsumexp(logits, axis=-1)) * weight
    return jax.lax.dynamic_update_slice_in_dim(logprobs, part, number * size, axis=1)

  initial = jnp.zeros(arranged[2].shape, jnp.float32)
  logprobs = jax.lax.fori_loop(0, slices_needed(arranged[2], num_slices), add_slice, initial)
  return jnp.take_along_axis(logprobs[:, :length], jnp.argsort(order, axis=1), axis=1)


def _token_logprobs_fwd(num_slices, hidden, table, targets, weights, transform):
  # Residuals are arrays, so an empty tuple stands for "needed", and None for "not needed".
  needed = [() if x.perturbed else None for x in (hidden, table)]
  arrays = [x.value for x in (hidden, table, targets, weights)]
  return token_logprobs(num_slices, *arrays, transform), (arrays, needed)


def _token_logprobs_bwd(num_slices, transform, residuals, cotangents):
  (hidden, table, targets, weights), needed = residuals
  # The gradient of Σ c · log P is that of a cross-entropy with the weights -c.
  _, *gradients = sliced_cross_entropy(
    num_slices,
    transform,
    hidden,
    table,
    targets,
    -cotangents * weights,
    *(x is not None for x in needed),
  )
  return (*gradients, None, None)


token_logprobs.defvjp(_token_logprobs_fwd, _token_logprobs_bwd, symbolic_zeros=True)
