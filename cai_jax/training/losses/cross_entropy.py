"""Cross-entropy of an output layer, computed without holding all logits at once."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from cai_jax.model.logits import PLAIN, LogitTransform
from cai_jax.model.precision import einsum_f32
from cai_jax.runtime.hardware import LOGITS_AT_ONCE

MIN_SLICES = 4  # of a row on one device, so that slices without targets can be skipped


def choose_num_slices(
  rows: int, length: int, vocab_size: int, sharding: NamedSharding | None
) -> int:
  """Return the number of slices that bounds a device's logits to about `LOGITS_AT_ONCE`.

  Args:
    rows: rows of the batch, over all devices.
    length: positions of a row.
    vocab_size: number of logits of a position.
    sharding: sharding of the rows, or None on a single device.
  """
  # On several devices, every slice gathers the output table and sums its gradient, so use as few
  # slices as fit. The vocabulary is split over `tensor`, and so are the logits.
  num_devices = 1 if sharding is None else sharding.mesh.size
  num_slices = -(-rows * length * vocab_size // (num_devices * LOGITS_AT_ONCE))
  if num_devices == 1:
    num_slices = max(num_slices, MIN_SLICES)
  return min(num_slices, length)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def weighted_cross_entropy(
  num_slices: int,
  hidden: jax.Array,
  table: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  transform: LogitTransform = PLAIN,
) -> jax.Array:
  """Return Σ weights × -log softmax(transform(hidden · tableᵀ))[targets], f32[].

  The function moves the positions with nonzero weight to the front of their row, and skips slices
  without any. If only responses are learned, this saves half of the logits or more.

  The function is differentiable in `hidden` and `table`. The gradients are computed in the forward
  pass, while the logits of a slice are in memory (Hsu et al. 2024, Liger Kernel): softmax minus
  one-hot, times the derivative of the transform.

  Args:
    num_slices: number of slices of the positions of a row, which are processed one after the other.
    hidden: [B,T,D], in the dtype that the logits are computed from.
    table: [V,D], the output layer.
    targets: i32[B,T].
    weights: f32[B,T].
    transform: divisor and cap of the logits.
  """
  arrays = hidden, table, targets, weights
  return sliced_cross_entropy(num_slices, transform, *arrays, False, False)[0]


def _cross_entropy_fwd(num_slices, hidden, table, targets, weights, transform):
  needs_gradient = hidden.perturbed, table.perturbed
  arrays = (x.value for x in (hidden, table, targets, weights))
  loss, *gradients = sliced_cross_entropy(num_slices, transform, *arrays, *needs_gradient)
  return loss, gradients


def _cross_entropy_bwd(num_slices, transform, gradients, g):
  del num_slices, transform
  return (*(None if x is None else (g * x).astype(x.dtype) for x in gradients), None, None)


weighted_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd, symbolic_zeros=True)


def front_order(weights: jax.Array) -> jax.Array:
  """Return the order i32[B,T] that moves the positions with nonzero weight [B,T] to the front."""
  return jnp.argsort(weights == 0, axis=1, stable=True)


def arrange(x: jax.Array, order: jax.Array, num_slices: int) -> jax.Array:
  """Order the positions of x [B,T,...], and pad them with 0 to a multiple of `num_slices`."""
  length = x.shape[1]
  size = -(-length // num_slices)
  x = jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)
  return jnp.pad(x, ((0, 0), (0, num_slices * size - length), *((0, 0),) * (x.ndim - 2)))


def slices_needed(weights: jax.Array, num_slices: int) -> jax.Array:
  """Return the number of slices i32[] that reach the last position with nonzero weight [B,T].

  The weights are in `front_order`, and their positions are a multiple of `num_slices`.
  """
  longest = jnp.max(jnp.sum(weights != 0, axis=1))
  return -(-longest // (weights.shape[1] // num_slices))


def sliced_cross_entropy(
  num_slices: int,
  transform: LogitTransform,
  hidden: jax.Array,
  table: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  needs_hidden_grad: bool,
  needs_table_grad: bool,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
  """Return the loss and its gradients by hidden and table; a gradient not needed is None.

  The other arguments are those of `weighted_cross_entropy`.
  """
  length = hidden.shape[1]
  size = -(-length // num_slices)
  order = front_order(weights)
  hidden, targets, weights = (arrange(x, order, num_slices) for x in (hidden, targets, weights))
  matrix = table.astype(hidden.dtype)

  def add_slice(number, carry):
    loss, hidden_grad, table_grad = carry
    x, target, weight = (
      jax.lax.dynamic_slice_in_dim(a, number * size, size, axis=1)
      for a in (hidden, targets, weights)
    )
    logits = transform.of_products(einsum_f32('BTD,VD->BTV', x, matrix))
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    loss += jnp.sum((log_z - target_logits) * weight)
    if needs_hidden_grad or needs_table_grad:
      tokens = jax.lax.broadcasted_iota(target.dtype, logits.shape, logits.ndim - 1)
      error = jnp.exp(logits - log_z[..., None]) - (tokens == target[..., None])
      error = transform.pull_back(logits, error * weight[..., None]).astype(x.dtype)
    if needs_hidden_grad:
      part = einsum_f32('BTV,VD->BTD', error, matrix).astype(x.dtype)
      hidden_grad = jax.lax.dynamic_update_slice_in_dim(hidden_grad, part, number * size, axis=1)
    if needs_table_grad:
      table_grad += einsum_f32('BTV,BTD->VD', error, x)
    return loss, hidden_grad, table_grad

  initial = (
    jnp.zeros(()),
    jnp.zeros_like(hidden) if needs_hidden_grad else None,
    jnp.zeros(table.shape, jnp.float32) if needs_table_grad else None,
  )
  loss, hidden_grad, table_grad = jax.lax.fori_loop(
    0, slices_needed(weights, num_slices), add_slice, initial
  )
  if needs_hidden_grad:
    inverse = jnp.argsort(order, axis=1)[..., None]
    hidden_grad = jnp.take_along_axis(hidden_grad[:, :length], inverse, axis=1)
  return loss, hidden_grad, None if table_grad is None else table_grad.astype(table.dtype)
