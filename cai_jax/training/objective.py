"""The objective of the supervised phase: negative log-likelihood of target tokens, as sums.

L(θ) = -1/N Σ_i log P(y_i | x_i; θ) over N sequences (normalization 'sequence', the method's), or
the same sum over the number of target tokens ('token'). Both travel as (sum, weight) up to the one
division in the train step, so packing, padding, accumulation and parallelism cannot change them.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from cai_jax.model.precision import einsum_f32
from cai_jax.runtime.hardware import LOGITS_AT_ONCE

# normalization → the sum that a batch's loss is divided by
WEIGHTS = {'sequence': 'num_sequences', 'token': 'num_tokens'}
LEAST_SLICES = 4  # of a row's places on one device, so that some can be left out

Batch = dict[str, jax.Array]  # tokens, positions, segment_ids, loss_mask: each [B,T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def cross_entropy(
  slices: int, hidden: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
  """Sum f32[] of weights × -log softmax(hidden · tableᵀ)[targets], by a slice of logits at a time.

  Args:
    slices: that the places of a row are taken in, one after the other.
    hidden: [B,T,D], in the dtype that logits are computed from.
    table: [V,D] of the output layer.
    targets: i32[B,T].
    weights: f32[B,T]. Each row's places without weight come last, and slices without any weight are
      left out: half the logits or more of dialogues of which only responses are learnt.

  Differentiable in hidden and table. Gradients are found together with the loss, as each slice's
  logits are at hand (as in Hsu et al. 2024, Liger Kernel): softmax minus one-hot, in one pass.
  """
  return _sliced(slices, hidden, table, targets, weights, False, False)[0]


def _cross_entropy_fwd(slices, hidden, table, targets, weights):
  wanted = hidden.perturbed, table.perturbed
  arrays = (x.value for x in (hidden, table, targets, weights))
  loss, *gradients = _sliced(slices, *arrays, *wanted)
  return loss, gradients


def _cross_entropy_bwd(slices, gradients, g):
  del slices
  return (*(None if x is None else (g * x).astype(x.dtype) for x in gradients), None, None)


cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd, symbolic_zeros=True)


def _sliced(slices, hidden, table, targets, weights, of_hidden, of_table):
  """(loss, its gradient by hidden, and by table), the gradients None where they are not wanted."""
  length = hidden.shape[1]
  size = -(-length // slices)
  order = jnp.argsort(weights == 0, axis=1, stable=True)

  def arrange(x):  # what fills the last slice up weighs nothing
    x = jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)
    return jnp.pad(x, ((0, 0), (0, slices * size - length), *((0, 0),) * (x.ndim - 2)))

  hidden, targets, weights = map(arrange, (hidden, targets, weights))
  matrix = table.astype(hidden.dtype)

  def one(number, carry):
    loss, by_hidden, by_table = carry
    x, target, weight = (
      jax.lax.dynamic_slice_in_dim(a, number * size, size, axis=1)
      for a in (hidden, targets, weights)
    )
    logits = einsum_f32('BTD,VD->BTV', x, matrix)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    loss += jnp.sum((log_z - chosen) * weight)
    if of_hidden or of_table:
      tokens = jax.lax.broadcasted_iota(target.dtype, logits.shape, logits.ndim - 1)
      error = jnp.exp(logits - log_z[..., None]) - (tokens == target[..., None])
      error = (error * weight[..., None]).astype(x.dtype)
    if of_hidden:
      part = einsum_f32('BTV,VD->BTD', error, matrix).astype(x.dtype)
      by_hidden = jax.lax.dynamic_update_slice_in_dim(by_hidden, part, number * size, axis=1)
    if of_table:
      by_table += einsum_f32('BTV,BTD->VD', error, x)
    return loss, by_hidden, by_table

  most = jnp.max(jnp.sum(weights != 0, axis=1))
  first = (
    jnp.zeros(()),
    jnp.zeros_like(hidden) if of_hidden else None,
    jnp.zeros(table.shape, jnp.float32) if of_table else None,
  )
  loss, by_hidden, by_table = jax.lax.fori_loop(0, -(-most // size), one, first)
  if of_hidden:
    back = jnp.argsort(order, axis=1)[..., None]
    by_hidden = jnp.take_along_axis(by_hidden[:, :length], back, axis=1)
  return loss, by_hidden, None if by_table is None else by_table.astype(table.dtype)


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

  rows, length = targets.shape
  # On several devices each slice gathers the table and sums its gradient: as few as fit, then. Its
  # V is split over `tensor`, and so are the logits.
  devices = 1 if sharding is None else sharding.mesh.size
  slices = -(-rows * length * model.config.vocab_size // (devices * LOGITS_AT_ONCE))
  if devices == 1:
    slices = max(slices, LEAST_SLICES)
  slices = min(slices, length)
  return cross_entropy(slices, hidden, model.output_table, targets, weights), sums
