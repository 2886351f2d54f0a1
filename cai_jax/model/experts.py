"""Mixtures of experts: a router picks a few of a layer's feed-forward networks for each token.

No token is dropped (Gale et al. 2022). Pairs of a token and one of its experts are sorted by
expert, so that each expert multiplies consecutive rows. `cai_jax.model.transformer` defines the
axis letters; in addition, E is the axis of experts, and R that of pairs, R = X · experts per token.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cai_jax.model.config import Experts, ModelConfig
from cai_jax.model.elementwise import gated_activation
from cai_jax.model.precision import PRODUCT, einsum_f32, sum_entries
from cai_jax.runtime.mesh import TOKENS, batch_shards

# Rows that a CPU multiplies at once. XLA for CPUs gives a row of a product the same bits for all of
# these numbers, and wherever the row stands.
SMALLEST_BLOCK, LARGEST_BLOCK = 4, 32
# Rows, and bytes of a row of a result at most, that a TPU's kernel holds at once. Its vector memory
# has no room for more.
TILE_ROWS, TILE_BYTES = 128, 2048


class Kernel(nnx.Module):
  """A matrix, or one for each expert, drawn with standard deviation gain · I^-1/2.

  Args:
    shape: [...,I,O].
    rngs: `rngs.params` draws it.
    param_dtype: dtype of the matrix.
    bias: whether there is a bias [...,O]; it starts at zero.
    gain: factor of the standard deviation.
  """

  def __init__(
    self,
    shape: tuple[int, ...],
    rngs: nnx.Rngs,
    param_dtype,
    bias: bool = False,
    gain: float = 1.0,
  ):
    std = gain * shape[-2] ** -0.5
    self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape, param_dtype))
    *stacked, _, outs = shape
    self.bias = nnx.Param(jnp.zeros((*stacked, outs), param_dtype)) if bias else None


class Networks(nnx.Module):
  """The experts of a layer, each of the form of `layers.MLP` with a gate."""

  def __init__(self, config: ModelConfig, experts: Experts, rngs: nnx.Rngs, param_dtype):
    e, d, f = experts.number, config.d_model, experts.d_ff
    self.gate = Kernel((e, d, f), rngs, param_dtype, experts.bias)
    self.up = Kernel((e, d, f), rngs, param_dtype, experts.bias)
    gain = (2 * config.num_layers) ** -0.5
    self.down = Kernel((e, f, d), rngs, param_dtype, experts.bias, gain)


class Routing(NamedTuple):
  """How routers have divided tokens, summed over tokens that are not padding.

  Attributes:
    counts: i32[...,E], number of tokens that each expert computes.
    probabilities: f32[...,E], sums of the routers' probabilities, which are over all experts.
    tokens: i32[...], number of tokens.
  """

  counts: jax.Array
  probabilities: jax.Array
  tokens: jax.Array


class MoE(nnx.Module):
  """A feed-forward layer of experts (Shazeer et al. 2017; Jiang et al. 2024, section 2.1).

  The result is Σ w_e · expert_e(x) over the experts with the largest router probabilities.
  """

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs, param_dtype):
    assert config.experts is not None
    self.config = config.experts
    self.activation = config.activation
    shape = config.d_model, config.experts.number
    self.router = Kernel(shape, rngs, param_dtype, config.experts.bias)
    self.experts = Networks(config, config.experts, rngs, param_dtype)

  def __call__(
    self, x: jax.Array, real: jax.Array | None = None, mesh: Mesh | None = None
  ) -> tuple[jax.Array, Routing]:
    """Return [B,T,D], which is 0 for padding, and the routing of each row.

    Args:
      x: [B,T,D].
      real: bool[B,T], false for padding, which no expert computes; None means that there is none.
      mesh: its devices route their own rows of the batch, or all rows if their number does not
        divide over them, and have their part of the experts. None leaves the split to XLA, which
        may copy all rows to all devices.
    """
    weights, ids, probabilities = self.route(x)
    if real is None:
      real = jnp.ones(x.shape[:2], bool)
    else:
      ids = jnp.where(real[..., None], ids, self.config.number)
    routing = Routing(
      jnp.sum(ids[..., None] == jnp.arange(self.config.number), (1, 2), dtype=jnp.int32),
      jnp.sum(jnp.where(real[..., None], probabilities, 0), 1),
      jnp.sum(real, 1, dtype=jnp.int32),
    )
    return self._compute(x, weights, ids, mesh), routing

  def _compute(
    self, x: jax.Array, weights: jax.Array, ids: jax.Array, mesh: Mesh | None
  ) -> jax.Array:
    """Return the weighted sum [B,T,D] of the results of each token's experts."""
    networks = self.experts
    layers = networks.gate, networks.up, networks.down
    gate, up, down = (layer.kernel[...].astype(x.dtype) for layer in layers)
    biases = tuple(b[...].astype(jnp.float32) for layer in layers if (b := layer.bias) is not None)
    run = functools.partial(run_experts, self.activation, self.config)
    if mesh is None or mesh.size == 1:
      return run(x, weights, ids, gate, up, down, biases).astype(x.dtype)

    def run_part(x, weights, ids, gate, up, down, biases):
      first = jax.lax.axis_index('expert') * gate.shape[0]
      if biases:  # one device of `tensor` adds the last one to the sum
        *others, last = biases
        biases = *others, jnp.where(jax.lax.axis_index('tensor') == 0, last, 0.0)
      out = run(x, weights, ids - first, gate, up, down, biases)
      return jax.lax.psum(out, ('expert', 'tensor'))

    # All devices compute the single row of a shared prefix.
    batch = TOKENS if len(x) % batch_shards(mesh) == 0 else P()
    into, out = P('expert', None, 'tensor'), P('expert', 'tensor', None)
    by_bias = (P('expert', 'tensor'), P('expert', 'tensor'), P('expert', None))[: len(biases)]
    run_all = jax.shard_map(
      run_part,
      mesh=mesh,
      in_specs=(batch, batch, batch, into, into, out, by_bias),
      out_specs=batch,
      check_vma=False,
    )
    return run_all(x, weights, ids, gate, up, down, biases).astype(x.dtype)

  def route(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Choose the experts of each token.

    Sums have a fixed order, so that a token's weights do not depend on other rows.

    Args:
      x: [B,T,D].

    Returns:
      The weights f32[B,T,k] and the numbers i32[B,T,k] of each token's experts, and the softmax
      f32[B,T,E] of the router over all experts.
    """
    kernel = self.router.kernel[...].astype(jnp.float32)
    flat = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    logits = einsum_f32('XD,DE->XE', flat, kernel).reshape(*x.shape[:2], -1)
    if self.router.bias is not None:
      logits = logits + self.router.bias[...].astype(jnp.float32)
    probabilities = _softmax(logits)
    if not self.config.softmax_first:
      top, ids = jax.lax.top_k(logits, self.config.per_token)
      return _softmax(top), ids, probabilities
    top, ids = jax.lax.top_k(probabilities, self.config.per_token)
    weights = top / sum_entries(top)[..., None] if self.config.renormalize else top
    return weights, ids, probabilities


def _softmax(x: jax.Array) -> jax.Array:
  """Return the softmax of f32[...,N] over its last axis, with a sum of fixed order."""
  shifted = jnp.exp(x - jax.lax.stop_gradient(x.max(-1, keepdims=True)))
  return shifted / sum_entries(shifted)[..., None]


def run_experts(
  activation: str,
  config: Experts,
  x: jax.Array,
  weights: jax.Array,
  ids: jax.Array,
  gate: jax.Array,
  up: jax.Array,
  down: jax.Array,
  biases: tuple[jax.Array, ...] = (),
) -> jax.Array:
  """Return the weighted sum f32[B,T,D] of the results of each token's experts.

  Args:
    activation: a key of `ACTIVATIONS`.
    config: the limit and the offset of experts.
    x: [B,T,D].
    weights: f32[B,T,k].
    ids: i32[B,T,k], numbers of experts. Those outside of 0 to E - 1 add nothing.
    gate, up: [E,D,F].
    down: [E,F,D].
    biases: f32[E,F], f32[E,F] and f32[E,D], those of the three, or ().
  """
  experts, per_token = len(gate), ids.shape[-1]
  ids = ids.reshape(-1)
  ids = jnp.where((ids >= 0) & (ids < experts), ids, experts)
  sizes = jnp.sum(ids[:, None] == jnp.arange(experts), 0, dtype=jnp.int32)
  order = jnp.argsort(ids)
  rows = x.reshape(-1, x.shape[-1])[order // per_token]

  def multiply(rows, kernel, number):
    product = grouped_product(rows, kernel, sizes)
    if biases:
      product = product + biases[number].at[ids[order]].get(mode='fill', fill_value=0)
    return product

  first, second = (
    checkpoint_name(multiply(rows, kernel, number).astype(x.dtype), PRODUCT)
    for number, kernel in enumerate((gate, up))
  )
  if config.limit is not None:
    first, second = jnp.minimum(first, config.limit), jnp.clip(second, -config.limit, config.limit)
  if config.up_offset:
    second = second + config.up_offset
  hidden = gated_activation(activation, first, second)
  # Rows behind those of all experts are arbitrary.
  out = multiply(hidden, down, 2)[jnp.argsort(order)]
  weighted = jnp.where((ids < experts)[:, None], out * weights.reshape(-1, 1), 0.0)
  parts = weighted.reshape(-1, per_token, x.shape[-1])
  total = parts[:, 0]
  for i in range(1, per_token):  # in this order, whatever the number of rows
    total = total + parts[:, i]
  return total.reshape(x.shape)


@jax.custom_vjp
def grouped_product(x: jax.Array, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
  """Return f32[R,O], each row of x times the matrix of its group.

  XLA for CPUs multiplies all rows of `jax.lax.ragged_dot` with all matrices. There, this function
  multiplies blocks of rows in a loop, and reads only the matrices of groups that are not empty.

  Args:
    x: [R,I], the rows of the first group, then those of the second, and so on.
    kernel: [E,I,O], of the same dtype.
    sizes: i32[E], rows of each group. What the result has for rows behind them is arbitrary.
  """

  def default(x, kernel, sizes):
    return _ragged_dot(x, kernel, sizes)

  on_cpu = functools.partial(_multiply_blocks, 'XI,IO->XO')
  return jax.lax.platform_dependent(x, kernel, sizes, cpu=on_cpu, default=default)


def _grouped_product_fwd(x, kernel, sizes):
  return grouped_product(x, kernel, sizes), (x, kernel, sizes)


def _grouped_product_bwd(inputs, cotangent):
  def on_cpu(x, kernel, sizes, cotangent):
    by_x = _multiply_blocks('XO,IO->XI', cotangent, kernel, sizes).astype(x.dtype)
    by_x = jnp.where(jnp.arange(len(x))[:, None] < sizes.sum(), by_x, 0)
    return by_x, _sum_blocks(x, cotangent, sizes).astype(kernel.dtype)

  def on_tpu(x, kernel, sizes, cotangent):
    by_x = jax.vjp(lambda x: _ragged_dot(x, kernel, sizes, x.dtype), x)[1](cotangent)
    return *by_x, sum_tiles(x, cotangent, sizes)

  def default(x, kernel, sizes, cotangent):
    product = functools.partial(_ragged_dot, sizes=sizes, dtype=x.dtype)
    return jax.vjp(product, x, kernel)[1](cotangent)

  cotangent = cotangent.astype(inputs[0].dtype)
  by_x, by_kernel = jax.lax.platform_dependent(
    *inputs, cotangent, cpu=on_cpu, tpu=on_tpu, default=default
  )
  return by_x, by_kernel, None


grouped_product.defvjp(_grouped_product_fwd, _grouped_product_bwd)


def _ragged_dot(x, kernel, sizes, dtype=jnp.float32):
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return jax.lax.ragged_dot(x, kernel, sizes, precision, preferred_element_type=dtype)


def sum_tiles(x: jax.Array, y: jax.Array, sizes: jax.Array, interpret: bool = False) -> jax.Array:
  """Return [E,I,O], the products xᵀ · y of the rows of each group, on a TPU.

  XLA for TPUs has a kernel for the other products of `jax.lax.ragged_dot`, but computes this one as
  a dense product of all rows for each group. JAX's Pallas kernel computes only the rows of each.
  Source: jax.experimental.pallas.ops.tpu.megablox.

  Args:
    x: [R,I].
    y: [R,O], of the same dtype.
    sizes: i32[E]. Rows behind those of all groups take no part.
    interpret: whether to run in Pallas's interpreter.
  """
  x, y = (jnp.pad(z, ((0, -len(z) % TILE_ROWS), (0, 0))) for z in (x, y))
  most = TILE_BYTES // x.dtype.itemsize
  tiles = TILE_ROWS, min(x.shape[1], most), min(y.shape[1], most)
  precision = 'highest' if x.dtype == jnp.float32 else 'default'
  with jax.default_matmul_precision(precision):
    return tgmm(x.T, y, sizes, x.dtype, tiles, interpret=interpret)


def _block_rows(rows: int, groups: int) -> int:
  """Return the rows of a block: about those of an average group, a power of 2."""
  average = -(-rows // groups)
  return min(max(1 << (average - 1).bit_length(), SMALLEST_BLOCK), LARGEST_BLOCK)


def _each_block(sizes: jax.Array, width: int, run, carry: jax.Array) -> jax.Array:
  """Return `carry` after a loop over blocks of consecutive rows, each within one group.

  Args:
    sizes: i32[E], rows of each group.
    width: rows of a block. The last block of a group has some of the next groups' rows, too.
    run: returns the next carry, from the first row of a block, its group, the end of the group and
      the carry.
    carry: the first one.
  """
  ends = jnp.cumsum(sizes)
  last = jnp.cumsum(-(-sizes // width))  # number of blocks up to the end of each group

  def body(state):
    block, carry = state
    group = jnp.searchsorted(last, block, side='right')
    start = ends[group] - sizes[group]
    number = block - (last[group] - -(-sizes[group] // width))
    return block + 1, run(start + number * width, group, ends[group], carry)

  return jax.lax.while_loop(lambda state: state[0] < last[-1], body, (jnp.int32(0), carry))[1]


def _multiply_blocks(equation: str, x: jax.Array, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
  """Return `grouped_product` on a CPU, or that with transposed matrices.

  Args:
    equation: of the product of rows and a group's matrix.
    x: [R,I], or [R,O] for transposed matrices.
    kernel: [E,I,O].
    sizes: i32[E].
  """
  rows, width = len(x), _block_rows(len(x), len(kernel))
  padded = jnp.pad(x, ((0, width), (0, 0)))  # so that each block ends within the array
  outs = kernel.shape[1 if equation.endswith('I') else 2]

  def run(start, group, _, result):
    block = jax.lax.dynamic_slice_in_dim(padded, start, width)
    product = einsum_f32(equation, block, kernel[group])
    # The next group's first block overwrites what this one has of its rows.
    return jax.lax.dynamic_update_slice_in_dim(result, product, start, 0)

  zeros = jnp.zeros((rows + width, outs), jnp.float32)
  return _each_block(sizes, width, run, zeros)[:rows]


def _sum_blocks(x: jax.Array, y: jax.Array, sizes: jax.Array) -> jax.Array:
  """Return f32[E,I,O], the products xᵀ · y of the rows of each group, on a CPU.

  Args:
    x: [R,I].
    y: [R,O].
    sizes: i32[E].
  """
  width = 4 * _block_rows(len(x), len(sizes))
  x, y = (jnp.pad(z, ((0, width), (0, 0))) for z in (x, y))

  def run(start, group, end, result):
    own = (start + jnp.arange(width) < end)[:, None]
    left, right = (jax.lax.dynamic_slice_in_dim(z, start, width) for z in (x, y))
    product = einsum_f32('XI,XO->IO', jnp.where(own, left, 0), jnp.where(own, right, 0))
    return result.at[group].add(product)

  zeros = jnp.zeros((len(sizes), x.shape[1], y.shape[1]), jnp.float32)
  return _each_block(sizes, width, run, zeros)
