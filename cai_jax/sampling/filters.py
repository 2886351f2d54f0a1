"""Filters: the thresholds of logit and weight that top-k, then top-p, then min-p keep.

Nothing is sorted: bisection over the bit patterns of floats finds the threshold of exactly the
right set. The search reads only the few blocks with the largest maxima if they suffice for a row,
and all blocks otherwise.

Axes: B rows, N blocks, S entries of a block, M candidate blocks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cai_jax.model.precision import sum_entries
from cai_jax.sampling.blocks import expand, sum_blocks, weigh

CANDIDATES = 64  # number of blocks with the largest maxima, which a filter searches first
LOWEST = jnp.finfo(jnp.float32).min  # below every logit except -inf
TINY = jnp.finfo(jnp.float32).tiny  # smallest weight that a search distinguishes from 0


class _Candidates(NamedTuple):
  """The blocks that a filter searches first.

  Attributes:
    blocks: f32[B,M,S], the blocks with the largest maxima.
    maxima: f32[B,M], their maxima, in decreasing order.
    rest: f32[B], largest maximum of all other blocks; -inf if there are none. No other block has an
      entry above it, so a threshold above it that holds for the candidates holds for the row.
  """

  blocks: jax.Array
  maxima: jax.Array
  rest: jax.Array


def kept_by(
  logits: jax.Array, weights: jax.Array, min_logit: jax.Array, min_weight: jax.Array
) -> jax.Array:
  """Return where logits and weights [B,...] reach the thresholds f32[B]."""
  return (logits >= expand(min_logit, logits)) & (weights >= expand(min_weight, logits))


def thresholds(
  blocks: jax.Array,
  block_max: jax.Array,
  temperature: jax.Array,
  top_k: jax.Array,
  top_p: jax.Array,
  min_p: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Return the smallest logit and the smallest weight that top-k, then top-p, then min-p keep.

  The most likely token has a weight of 1, so min-p is itself the smallest weight.

  Args:
    blocks: f32[B,N,S], logits.
    block_max: f32[B,N], each block's largest logit.
    temperature: f32[B], positive.
    top_k: i32[B]; 0 keeps all tokens.
    top_p: f32[B]; 1 keeps all tokens.
    min_p: f32[B]; 0 keeps all tokens.

  Returns:
    Two thresholds f32[B]; a token is kept if it reaches both.
  """
  top = block_max.max(-1)
  candidates = _candidates(blocks, block_max)
  min_logit = jax.lax.cond(
    jnp.any(top_k > 0),
    lambda: _kth_logit(blocks, candidates, top, top_k),
    lambda: jnp.full_like(top, LOWEST),
  )
  min_logit, min_weight = jax.lax.cond(
    jnp.any(top_p < 1),
    lambda: _nucleus(blocks, candidates, top, temperature, min_logit, top_p),
    lambda: (min_logit, jnp.zeros_like(top)),
  )
  return min_logit, jnp.maximum(min_weight, min_p)


def _candidates(blocks: jax.Array, block_max: jax.Array) -> _Candidates:
  """Return the candidates among blocks f32[B,N,S] with maxima f32[B,N]."""
  if blocks.shape[1] <= CANDIDATES:
    return _Candidates(blocks, -jnp.sort(-block_max, -1), jnp.full(len(block_max), -jnp.inf))
  maxima, index = jax.lax.top_k(block_max, CANDIDATES + 1)
  candidates = jnp.take_along_axis(blocks, index[:, :CANDIDATES, None], 1)
  return _Candidates(candidates, maxima[:, :CANDIDATES], maxima[:, CANDIDATES])


def _kth_logit(
  blocks: jax.Array, candidates: _Candidates, top: jax.Array, k: jax.Array
) -> jax.Array:
  """Return a threshold that keeps the k-th largest logit and everything above it.

  Args:
    blocks: f32[B,N,S], logits.
    candidates: the blocks to search first.
    top: f32[B], each row's largest logit.
    k: i32[B].

  Returns:
    f32[B]; LOWEST where k is 0.
  """
  count = candidates.blocks.shape[1]
  # The k largest maxima are k entries, so the k-th largest entry is at least the k-th maximum.
  low = jnp.take_along_axis(candidates.maxima, jnp.clip(k - 1, 0, count - 1)[:, None], 1)[:, 0]
  low = jnp.where(k <= count, jnp.maximum(low, LOWEST), LOWEST)
  # Rows whose answer is among the candidates, and the rows that need all blocks.
  easy = (k > 0) & ((k <= count) | (count == blocks.shape[1]))
  threshold, _ = _search(candidates.blocks, None, k.astype(jnp.float32), low, top, easy)
  hard = (k > 0) & ~easy
  threshold = _where(
    hard, lambda: _search(blocks, None, k.astype(jnp.float32), low, top, hard)[0], threshold
  )
  return jnp.where(k > 0, threshold, LOWEST)


def _nucleus(
  blocks: jax.Array,
  candidates: _Candidates,
  top: jax.Array,
  temperature: jax.Array,
  min_logit: jax.Array,
  p: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Return the thresholds of logit and weight that keep the nucleus of the tokens that top-k keeps.

  Args:
    blocks: f32[B,N,S], logits.
    candidates: the blocks to search first.
    top: f32[B], each row's largest logit.
    temperature: f32[B], positive.
    min_logit: f32[B], the smallest logit that top-k keeps.
    p: f32[B].

  Returns:
    Two thresholds f32[B].
  """

  def kept_weights(logits):
    kept = logits >= expand(min_logit, logits)
    return jnp.where(kept, weigh(logits, top, temperature), 0.0)

  weights, candidate_weights = kept_weights(blocks), kept_weights(candidates.blocks)
  total = sum_blocks(sum_entries(weights))
  target = p * total
  # All weights below `low` together sum to less than half of the mass outside the nucleus.
  low = jnp.maximum((1 - p) * total / (2 * blocks[0].size), TINY)
  one = jnp.ones_like(low)
  rest_weight = weigh(candidates.rest, top, temperature)
  start = jnp.where(
    min_logit > candidates.rest, low, jnp.maximum(low, _float(_order(rest_weight) + 1))
  )
  # Rows whose answer is among the candidates, and the rows that need all blocks.
  easy = (p < 1) & (_mass(candidate_weights, candidate_weights, start) >= target)
  min_weight, excess = _search(candidate_weights, candidate_weights, target, start, one, easy)
  hard = (p < 1) & ~easy
  min_weight, excess = _where(
    hard, lambda: _search(weights, weights, target, low, one, hard), (min_weight, excess)
  )
  # Different logits can have equal weights in f32. If the smallest weight kept is shared by several
  # tokens and not all of them are needed, raise the logit threshold to drop the least likely ones.
  tied = (p < 1) & (excess >= min_weight)

  def break_ties():
    logits = jnp.where(weights == expand(min_weight, weights), blocks, -jnp.inf)
    lowest = jnp.full_like(top, LOWEST)
    needed = jnp.maximum(_mass(logits, None, lowest) - jnp.floor(excess / min_weight), 1.0)
    return _search(logits, None, needed, lowest, top, tied)[0]

  return _where(tied, break_ties, min_logit), jnp.where(p < 1, min_weight, 0.0)


def _where(rows: jax.Array, new: Callable[[], Any], old: Any) -> Any:
  """Return new() in the rows bool[B] and `old` elsewhere; skip new() if no row needs it."""
  choose = lambda a, b: jnp.where(rows, a, b)  # noqa: E731
  return jax.lax.cond(jnp.any(rows), lambda: jax.tree.map(choose, new(), old), lambda: old)


def _mass(values: jax.Array, masses: jax.Array | None, threshold: jax.Array) -> jax.Array:
  """Return the total mass f32[B] of the entries of values f32[B,N,S] that reach the threshold.

  `masses` is f32[B,N,S]; None gives every entry a mass of 1.
  """
  kept = values >= expand(threshold, values)
  return sum_blocks(sum_entries(jnp.where(kept, 1.0 if masses is None else masses, 0.0)))


def _search(
  values: jax.Array,
  masses: jax.Array | None,
  target: jax.Array,
  low: jax.Array,
  high: jax.Array,
  rows: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Find the threshold that keeps the fewest entries whose total mass reaches the target.

  This bisects over the bit patterns of floats, in at most 32 steps. The order of summation is
  fixed, so the mass never increases with the threshold. A row is finished when its bounds are
  neighbours, or when dropping any one more entry would miss the target. The course of each row's
  search depends on that row alone.

  Args:
    values: f32[B,N,S].
    masses: `values` itself if each entry's mass is its value, or None if it is 1.
    target: f32[B].
    low: f32[B], lower bound of the threshold, inclusive. It is the answer where even its mass does
      not reach the target.
    high: f32[B], upper bound of the threshold, inclusive.
    rows: bool[B], the rows to search. The results of all other rows are meaningless.

  Returns:
    The threshold f32[B], and the mass f32[B] that it keeps beyond the target.
  """

  def unfinished(low, excess, high):
    return (low < high - 1) & (excess >= (1.0 if masses is None else _float(low)))

  def bisect(state):
    low, excess, high = state
    active = unfinished(*state)
    middle = (low >> 1) + (high >> 1) + (low & high & 1)
    middle_excess = _mass(values, masses, _float(middle)) - target
    raise_low, lower_high = active & (middle_excess >= 0), active & (middle_excess < 0)
    return (
      jnp.where(raise_low, middle, low),
      jnp.where(raise_low, middle_excess, excess),
      jnp.where(lower_high, middle, high),
    )

  excess = _mass(values, masses, low) - target
  low, high = _order(low), _order(high) + 1
  state = low, excess, jnp.where(rows, high, low)
  low, excess, _ = jax.lax.while_loop(lambda state: jnp.any(unfinished(*state)), bisect, state)
  return _float(low), excess


def _order(x: jax.Array) -> jax.Array:
  """Return integers i32 that are ordered like the floats f32."""
  bits = jax.lax.bitcast_convert_type(x, jnp.int32)
  return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _float(order: jax.Array) -> jax.Array:
  """Return the floats f32 that `_order` maps to these integers i32."""
  return jax.lax.bitcast_convert_type(order ^ ((order >> 31) & 0x7FFFFFFF), jnp.float32)
