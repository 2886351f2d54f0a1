"""Measure the machine's limits, and relate a decode step to them (Williams et al. 2009)."""

import concurrent.futures
import functools
import os
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

ARRAY_BYTES = 256 * 2**20  # much larger than any cache
ARRAYS = 4
SQUARE = 3072  # rows and columns of the matrices in the timed product
TIMED_LAYERS = 8  # each with weights of its own, so that they do not stay in the caches
ROWS = {'cpu': (256, 512, 1024), 'gpu': (4096, 16384)}  # tokens of a timed product


def best_rate(work: float, function: Callable[[], object], repetitions: int = 5) -> float:
  """Return the work per second of the fastest of several runs, after an untimed one."""
  function()
  seconds = []
  for _ in range(repetitions):
    start = time.perf_counter()
    function()
    seconds.append(time.perf_counter() - start)
  return work / min(seconds)


def bandwidth() -> float:
  """Return the bytes per second read from memory, by the fastest of several ways to sum arrays."""
  columns = 8192
  shape = (ARRAY_BYTES // 4 // columns, columns)
  arrays = [jnp.full(shape, 1.0, jnp.float32) + i for i in range(ARRAYS)]
  vector = jnp.ones(columns, jnp.float32)
  total = ARRAYS * ARRAY_BYTES

  @jax.jit
  def sums(arrays):
    return [x.sum() for x in arrays]

  @jax.jit
  def row_sums(arrays):
    return [x.sum(-1) for x in arrays]

  @jax.jit
  def products(arrays, vector):
    return [x @ vector for x in arrays]

  rates = [
    best_rate(total, lambda: jax.block_until_ready(sums(arrays))),
    best_rate(total, lambda: jax.block_until_ready(row_sums(arrays))),
    best_rate(total, lambda: jax.block_until_ready(products(arrays, vector))),
  ]
  if jax.default_backend() == 'cpu':
    parts = [part for x in arrays for part in np.array_split(np.asarray(x), 4)]
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
      rates.append(best_rate(total, lambda: list(pool.map(np.sum, parts))))
  return max(rates)


def matmul_rate(dtype: str) -> float:
  """Return the FLOP/s of a large square matrix product, accumulated in f32."""
  a, b = (jnp.full((SQUARE, SQUARE), 1.0 + i, dtype) for i in range(2))
  precision = jax.lax.Precision.HIGHEST if dtype == 'float32' else None

  @jax.jit
  def product(a, b):
    return jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32)

  return best_rate(2 * SQUARE**3, lambda: jax.block_until_ready(product(a, b)), 3)


def layer_rate(shapes: Sequence[tuple[int, int]], rows: int, dtype: str, layers: int) -> float:
  """Return the FLOP/s of the products of some layers, accumulated in f32.

  Args:
    shapes: (inputs, outputs) of a layer's matrices.
    rows: number of tokens.
    dtype: of the activations and weights.
    layers: number of layers, each with weights of its own.
  """
  inputs = {width: jnp.full((rows, width), 0.5, dtype) for width, _ in shapes}
  weights = [[jnp.full(shape, 1.0 + i, dtype) for shape in shapes] for i in range(layers)]
  precision = jax.lax.Precision.HIGHEST if dtype == 'float32' else None

  @jax.jit
  def products(inputs, weights):
    product = functools.partial(jnp.matmul, precision=precision, preferred_element_type=jnp.float32)
    # Rounded as a model rounds them, so that writing costs no more than it must.
    return [[product(inputs[w.shape[0]], w).astype(dtype) for w in layer] for layer in weights]

  work = 2 * rows * sum(a * b for a, b in shapes) * layers
  return best_rate(work, lambda: jax.block_until_ready(products(inputs, weights)), 3)


def rates(shapes: Sequence[tuple[int, int]], output: tuple[int, int], dtype: str) -> dict:
  """Return the machine's rates for a model's own shapes.

  The rate of the layers is the best over `ROWS`, for separate matrices and for those with the same
  input joined, as some programs join them.

  Args:
    shapes: (inputs, outputs) of a layer's matrices: q, k, v, o, gate, up, down.
    output: (inputs, outputs) of the output layer.
    dtype: of the activations and weights.
  """
  (d, q), (_, k), (_, v), o, (_, gate), (_, up), down = shapes
  joined = [(d, q + k + v), o, (d, gate + up), down]
  row_counts = ROWS['cpu' if jax.default_backend() == 'cpu' else 'gpu']
  return {
    'layer_flops_per_second': max(
      layer_rate(group, rows, dtype, TIMED_LAYERS)
      for group in (shapes, joined)
      for rows in row_counts
    ),
    'output_flops_per_second': max(layer_rate([output], rows, dtype, 1) for rows in row_counts[:2]),
    'square_flops_per_second': matmul_rate(dtype),
    'bytes_per_second': bandwidth(),
  }


def limits(dtype: str) -> dict[str, float]:
  """Return the bytes read per second, and the FLOP/s in `dtype`."""
  return {'bytes_per_second': bandwidth(), 'flops_per_second': matmul_rate(dtype)}


def bound(params: int, width: int, batch: int, cache_bytes: int, limits: dict[str, float]) -> float:
  """Return a lower bound on the seconds of a decode step.

  The weights are read once for all rows, unless arithmetic takes longer; each row reads its cache.

  Args:
    params: number of parameters. Each takes part in one multiplication and addition per row; a tied
      embedding does so as the output layer.
    width: bytes of a parameter.
    batch: number of rows.
    cache_bytes: bytes of keys and values that one row reads.
    limits: as the function `limits` returns them.
  """
  read = params * width / limits['bytes_per_second']
  multiplied = 2 * params * batch / limits['flops_per_second']
  return max(read, multiplied) + batch * cache_bytes / limits['bytes_per_second']


def shares(
  seconds: Sequence[float],
  params: int,
  width: int,
  batch: int,
  live_bytes: int,
  allocated_bytes: int,
  limits: dict[str, float],
) -> dict:
  """Return a step's median time, and the roofline's bound divided by it.

  Args:
    seconds: times of the step.
    params, width, batch, limits: as for `bound`.
    live_bytes: cache bytes of a row's live tokens.
    allocated_bytes: cache bytes that are allocated for a row.
  """
  step = float(np.median(seconds))
  live = bound(params, width, batch, live_bytes, limits)
  allocated = bound(params, width, batch, allocated_bytes, limits)
  return {
    'step_seconds': step,
    'all_step_seconds': list(seconds),
    'bound_seconds': live,
    'share': live / step,
    'bound_seconds_allocated': allocated,
    'share_allocated': allocated / step,
    'bytes_per_second': (params * width + batch * live_bytes) / step,
  }
