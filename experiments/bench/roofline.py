"""Measure the machine's limits, and relate a decode step to them (Williams et al. 2009)."""

import concurrent.futures
import os
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

ARRAY_BYTES = 256 * 2**20  # much larger than any cache
ARRAYS = 4
SQUARE = 3072  # rows and columns of the matrices in the timed product


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
