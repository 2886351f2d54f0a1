"""The objective of the supervised phase: negative log-likelihood of target tokens, as sums.

L(θ) = -1/N Σ_i log P(y_i | x_i; θ) over N sequences (normalization 'sequence', the method's), or
the same sum over the number of target tokens ('token'). Both travel as (sum, weight) up to the one
division in the train step, so packing, padding, accumulation and parallelism cannot change them.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

# normalization → the sum that a batch's loss is divided by
WEIGHTS = {'sequence': 'num_sequences', 'token': 'num_tokens'}
LOGITS_AT_ONCE = 2**28  # elements a device (1 GB in f32): more are computed in slices of the rows

Batch = dict[str, jax.Array]  # tokens, positions, segment_ids, loss_mask: each [B,T]


@jax.custom_vjp
def cross_entropy(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
  """Sum f32[] of weights f32[...] × -log softmax(logits f32[...,V])[targets i32[...]].

  Differentiable in the logits alone. The backward pass is written out: softmax minus one-hot in one
  pass, where differentiating the gather of the target's logit would scatter.
  """
  return _cross_entropy_fwd(logits, targets, weights)[0]


def _cross_entropy_fwd(logits, targets, weights):
  log_z = jax.nn.logsumexp(logits, axis=-1)
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return jnp.sum((log_z - chosen) * weights), (logits, log_z, targets, weights)


def _cross_entropy_bwd(residuals, g):
  logits, log_z, targets, weights = residuals
  tokens = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
  error = jnp.exp(logits - log_z[..., None]) - (tokens == targets[..., None])
  return error * (weights * g)[..., None], None, None


cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def targets_of(batch: Batch) -> tuple[jax.Array, jax.Array]:
  """(targets i32[B,T], weights f32[B,T]): what each place predicts, and whether that counts.

  Place t predicts token t+1 of its own segment, where `loss_mask` marks that token; the first
  token of a segment is never a target, nor is padding (segment 0).
  """
  segments = batch['segment_ids']
  following = jnp.roll(segments, -1, axis=1).at[:, -1].set(0)
  marked = jnp.roll(batch['loss_mask'], -1, axis=1) != 0
  weights = marked & (segments == following) & (segments > 0)
  return jnp.roll(batch['tokens'], -1, axis=1), weights.astype(jnp.float32)


def count_sequences(segment_ids: jax.Array, weights: jax.Array) -> jax.Array:
  """Number f32[] of segments with a target; segment_ids i32[B,T] ≤ T, weights f32[B,T]."""
  rows = jnp.arange(segment_ids.shape[0])[:, None]
  found = jnp.zeros((segment_ids.shape[0], segment_ids.shape[1] + 1))
  return jnp.sum(found.at[rows, segment_ids].max(weights))


def loss_and_metrics(
  graph: nnx.GraphDef,
  params,
  batch: Batch,
  sharding: NamedSharding | None = None,
  remat: str = 'none',
  attention: str = 'xla',
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """(nll f32[] summed over target tokens, sums f32[]: num_tokens, num_sequences).

  Args:
    graph: static half of a Transformer (`LM.graph`), which fixes the compute dtype.
    params: its parameters.
    batch: tokens, positions (from 0 in each segment), segment_ids (from 1, 0 is padding), each
      i32[B,T], and loss_mask bool or i32[B,T], nonzero on the tokens to learn.
    sharding: of rows, the batch's (`parallel.batch_sharding`); None on one device.
    remat: what the backward pass computes again: a name of `transformer.REMAT`.
    attention: a name of `kernels.KERNELS`.
  """
  model = nnx.merge(graph, params)
  hidden, _ = model(
    batch['tokens'],
    batch['positions'],
    batch['segment_ids'],
    sharding=sharding,
    remat=remat,
    attention=attention,
  )
  targets, weights = targets_of(batch)
  sums = {
    'num_tokens': jnp.sum(weights),
    'num_sequences': count_sequences(batch['segment_ids'], weights),
  }

  def nll(hidden, targets, weights):
    return cross_entropy(model.unembed(hidden), targets, weights)

  rows, length = targets.shape
  logits = rows * length * model.config.vocab_size
  if sharding is not None:  # the table's V is split over `tensor`, and so are they
    logits = -(-logits // sharding.mesh.size)
  slices = min(-(-logits // LOGITS_AT_ONCE), length)
  if slices == 1:
    return nll(hidden, targets, weights), sums

  def split(x):  # [B,T,...] → [slices,B,⌈T/slices⌉,...]; what fills the last one up weighs nothing
    of_slice = -(-length // slices)
    x = jnp.pad(x, ((0, 0), (0, slices * of_slice - length), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(rows, slices, of_slice, *x.shape[2:]), 1, 0)

  # The logits of a slice are made again in the backward pass instead of kept.
  part = jax.checkpoint(nll)
  total, _ = jax.lax.scan(
    lambda total, parts: (total + part(*parts), None),
    jnp.zeros(()),
    tuple(map(split, (hidden, targets, weights))),
  )
  return total, sums
