"""Draw one token per row from logits: temperature, top-k, top-p and one uniform number per row.

No step sorts the vocabulary or draws a random number per vocabulary entry. Logits f32[B,V] are
viewed as blocks [B,N,S]. A draw without filters reads them twice, for the maximum and for the sum
of each block. A filter keeps the logits above a threshold. Bisection over the bit patterns of
floats finds the threshold of exactly the right set. The search reads only the few blocks with the
largest maxima if they suffice for a row, and all blocks otherwise.

To add a filter or a penalty:

1. Add its setting to `SamplingConfig` in `cai_jax/sampling/types.py`, with a default that turns it
   off and `added=True`.
2. Add an array to `Slots` in `cai_jax/sampling/device.py`, set it in `Slots.empty` and
   `Slots.start`, and pass it to `sample` in `_decode`. A penalty on earlier tokens also needs a
   record of them, which `_decode` carries through its loop.
3. Apply it in `sample` below. A penalty changes a copy of the logits that tokens are drawn from;
   the returned log-probabilities stay the model's own. A filter is one more condition in `_kept`.
   Each row must depend on its own settings alone.
4. Add the setting to the key in `cai_jax/sampling/journal.py:digest`, only if it is on, so that
   existing journals stay valid.
5. If servers support it, send it in `cai_jax/sampling/remote/protocol.py:request_body`; otherwise
   refuse it in `RemoteConfig.check_sampling`.

Axes: B rows, V vocabulary, N blocks, S entries of a block, M candidate blocks.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 128  # vocabulary entries of a block
PIECES = 16  # a large vocabulary is cut into this many pieces, so that a mesh can split it
LARGE = 2**14  # vocabulary size from which it is cut into pieces
CANDIDATES = 64  # number of blocks with the largest maxima, which a filter searches first
LOWEST = jnp.finfo(jnp.float32).min  # below every logit except -inf
TINY = jnp.finfo(jnp.float32).tiny  # smallest weight that a search distinguishes from 0


def uniforms(keys: jax.Array, index: jax.Array) -> jax.Array:
  """Return one uniform number in [0, 1) per row, a pure function of the row's key and index.

  The numbers are multiples of 2^-23, so probabilities are exact to within 2^-23. A token much less
  likely than that is drawn too rarely or never. The random generator is fixed here, so that no JAX
  setting changes the result.

  Args:
    keys: u32[B,2], the random key of each row.
    index: i32[B], such as the number of tokens sampled so far.

  Returns:
    f32[B].
  """

  def uniform(key, i):
    key = jax.random.wrap_key_data(key, impl='threefry2x32')
    return jax.random.uniform(jax.random.fold_in(key, i))

  with jax.threefry_partitionable(True):
    return jax.vmap(uniform)(keys, index)


def sample(
  logits: jax.Array,
  u: jax.Array,
  temperature: jax.Array,
  top_k: jax.Array,
  top_p: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Draw one token per row, after temperature, then top-k, then top-p.

  If no row uses a filter, filters take no time.

  Args:
    logits: f32[B,V].
    u: f32[B] in [0, 1), the only randomness.
    temperature: f32[B]; 0 picks the most likely token.
    top_k: i32[B]; 0 keeps all tokens.
    top_p: f32[B] in (0, 1].

  Returns:
    Tokens i32[B], and their log-probabilities f32[B] under the model itself: log softmax(logits),
    before temperature and filters.
  """
  greedy = temperature <= 0
  top_k, top_p = jnp.where(greedy, 0, top_k), jnp.where(greedy, 1.0, top_p)
  temperature = jnp.where(greedy, 1.0, temperature)
  blocks = _blocked(logits, -jnp.inf)
  block_max = blocks.max(-1)
  top = block_max.max(-1)
  unfiltered_sums = _sum(_weights(blocks, top, temperature))

  def filtered():
    min_logit, min_weight = _thresholds(blocks, block_max, temperature, top_k, top_p)
    weights = _weights(blocks, top, temperature)
    kept = _kept(blocks, weights, min_logit, min_weight)
    # A row without a filter uses the same sums, to the bit, whether or not other rows have one.
    has_filter = ((top_k > 0) | (top_p < 1))[:, None]
    sums = jnp.where(has_filter, _sum(jnp.where(kept, weights, 0.0)), unfiltered_sums)
    return min_logit, min_weight, sums

  def unfiltered():
    return jnp.full_like(top, LOWEST), jnp.zeros_like(top), unfiltered_sums

  any_filter = jnp.any((top_k > 0) | (top_p < 1))
  min_logit, min_weight, sums = jax.lax.cond(any_filter, filtered, unfiltered)
  block, start, target = _draw_block(sums, u)
  block = jnp.where(greedy, jnp.argmax(block_max, -1), block)
  entries = _take(blocks, block)
  weights = _weights(entries, top, temperature)
  weights = jnp.where(_kept(entries, weights, min_logit, min_weight), weights, 0.0)
  entry = jnp.where(greedy, jnp.argmax(entries, -1), _draw_entry(weights, start, target))
  shifted_logit = jnp.take_along_axis(entries, entry[:, None], -1)[:, 0] - top
  scaled_total = _total(unfiltered_sums)
  plain_total = jax.lax.cond(
    jnp.any(temperature != 1),
    lambda: _total(_sum(_weights(blocks, top, jnp.ones_like(temperature)))),
    lambda: scaled_total,
  )
  total = jnp.where(temperature == 1, scaled_total, plain_total)
  return _token(block, entry, logits.shape[1]), shifted_logit - jnp.log(total)


def keep_mask(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
  """Return the mask of tokens that top-k and then top-p keep.

  Top-k (Fan et al. 2018) keeps the k largest logits and any equal to the k-th. Top-p (Holtzman et
  al. 2020) sorts the remaining tokens by probability, keeps the shortest prefix whose mass reaches
  p, and any token as likely as the last one. The most likely token is always kept, and a logit of
  -inf never is. Masses are f32 sums. If the mass of a set equals p to within rounding, the result
  may differ from exact arithmetic by one token, but it is always the same for the same row.

  Args:
    logits: f32[B,V].
    top_k: i32[B]; 0 keeps all tokens.
    top_p: f32[B]; 1 keeps all tokens.

  Returns:
    bool[B,V].
  """
  blocks = _blocked(logits, -jnp.inf)
  block_max, temperature = blocks.max(-1), jnp.ones(len(logits))
  min_logit, min_weight = _thresholds(
    blocks, block_max, temperature, jnp.asarray(top_k), jnp.asarray(top_p)
  )
  weights = _weights(blocks, block_max.max(-1), temperature)
  kept = _kept(blocks, weights, min_logit, min_weight)
  count = _piece_count(logits.shape[1])
  pieces = kept.reshape(len(logits), count, -1)[:, :, : logits.shape[1] // count]
  return pieces.reshape(logits.shape)


def inverse_cdf(weights: jax.Array, u: jax.Array) -> jax.Array:
  """Return the token at which the running sum of weights exceeds u times their total.

  The search first finds the block and then the entry in it, so no running sum spans the whole
  vocabulary. A token of weight 0 is never drawn.

  Args:
    weights: f32[B,V], non-negative.
    u: f32[B] in [0, 1).

  Returns:
    i32[B].
  """
  blocks = _blocked(weights, 0.0)
  block, start, target = _draw_block(_sum(blocks), u)
  entry = _draw_entry(_take(blocks, block), start, target)
  return _token(block, entry, weights.shape[1])


def _blocked(rows: jax.Array, filler: float) -> jax.Array:
  """Cut rows [B,V] into pieces and these into blocks [B,N,S]; pad each piece's last block.

  Without pieces, the blocks would straddle devices: a vocabulary of 1,002 blocks split over four
  devices made GSPMD compute the logits of half of it on each device.
  """
  count = _piece_count(rows.shape[1])
  pieces = rows.reshape(len(rows), count, -1)
  padding = -pieces.shape[2] % BLOCK
  if padding:
    pieces = jnp.pad(pieces, ((0, 0), (0, 0), (0, padding)), constant_values=filler)
  return pieces.reshape(len(rows), -1, BLOCK)


def _piece_count(vocab_size: int) -> int:
  return math.gcd(vocab_size, PIECES) if vocab_size >= LARGE else 1


def _token(block: jax.Array, entry: jax.Array, vocab_size: int) -> jax.Array:
  """Return the tokens i32[B] at these entries i32[B] of blocks i32[B]."""
  piece_size = vocab_size // _piece_count(vocab_size)
  blocks = -(-piece_size // BLOCK)
  return (block // blocks * piece_size + block % blocks * BLOCK + entry).astype(jnp.int32)


def _take(blocks: jax.Array, block: jax.Array) -> jax.Array:
  """Return the block [B,S] of each row of blocks [B,N,S] that block i32[B] names."""
  return jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0]


def _row(per_row: jax.Array, like: jax.Array) -> jax.Array:
  """Append axes of length 1 to per_row [B], up to the rank of `like`."""
  return per_row.reshape(-1, *[1] * (like.ndim - 1))


def _sum(x: jax.Array) -> jax.Array:
  """Sum f32[...,N] over its last axis.

  On CPUs, the order of XLA's own sum depends on the other axes, and so on the number of rows. There
  this function adds the two halves until one entry is left. That is as fast as XLA's sum, and
  faster for a masked array.
  """

  def halves(x):
    while x.shape[-1] > 1:
      odd = x.shape[-1] % 2
      x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)]) if odd else x
      x = x[..., : x.shape[-1] // 2] + x[..., x.shape[-1] // 2 :]
    return x[..., 0]

  return jax.lax.platform_dependent(x, cpu=halves, default=lambda x: x.sum(-1))


def _total(sums: jax.Array) -> jax.Array:
  """Sum block sums f32[B,N] to f32[B]; on CPUs, in an order that depends on N alone."""
  return jax.lax.platform_dependent(
    sums, cpu=lambda x: jnp.cumsum(x, -1)[:, -1], default=lambda x: x.sum(-1)
  )


def _weights(logits: jax.Array, top: jax.Array, temperature: jax.Array) -> jax.Array:
  """Return exp((logits - top) / temperature), which is 1 for the most likely token.

  Args:
    logits: f32[B,...].
    top: f32[B], each row's largest logit.
    temperature: f32[B], positive.
  """
  return jnp.exp((logits - _row(top, logits)) / _row(temperature, logits))


def _draw_block(sums: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Draw a block per row.

  Args:
    sums: f32[B,N], sum of each block's weights.
    u: f32[B] in [0, 1).

  Returns:
    The block i32[B], the sum f32[B] of the blocks before it, and the target sum f32[B].
  """
  ends = jnp.cumsum(sums, -1)
  target = u * ends[:, -1]
  block = _first_above(ends, sums, target)
  start = jnp.take_along_axis(ends - sums, block[:, None], 1)[:, 0]
  return block, start, target


def _draw_entry(weights: jax.Array, start: jax.Array, target: jax.Array) -> jax.Array:
  """Return the entry i32[B] at which the running sum of weights f32[B,S] from `start` exceeds
  `target` f32[B].
  """
  return _first_above(start[:, None] + jnp.cumsum(weights, -1), weights, target)


def _first_above(ends: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
  """Return the first index whose running sum exceeds `target` and whose weight is positive.

  Rounding can lead to an entry of weight 0, or past the last entry. Then the next entry with a
  positive weight is taken, or else the last one.

  Args:
    ends: f32[B,S], running sums.
    weights: f32[B,S], the summed weights.
    target: f32[B].

  Returns:
    i32[B].
  """
  index, positive = jnp.arange(weights.shape[-1], dtype=jnp.int32), weights > 0
  last = jnp.max(jnp.where(positive, index, 0), -1)
  first = jnp.minimum(jnp.sum(ends <= target[:, None], -1, dtype=jnp.int32), last)
  return jnp.min(jnp.where(positive & (index >= first[:, None]), index, last[:, None]), -1)


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


def _kept(
  logits: jax.Array, weights: jax.Array, min_logit: jax.Array, min_weight: jax.Array
) -> jax.Array:
  """Return where logits and weights [B,...] reach the thresholds f32[B]."""
  return (logits >= _row(min_logit, logits)) & (weights >= _row(min_weight, logits))


def _thresholds(
  blocks: jax.Array,
  block_max: jax.Array,
  temperature: jax.Array,
  top_k: jax.Array,
  top_p: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Return the smallest logit and the smallest weight that top-k and then top-p keep.

  Args:
    blocks: f32[B,N,S], logits.
    block_max: f32[B,N], each block's largest logit.
    temperature: f32[B], positive.
    top_k: i32[B]; 0 keeps all tokens.
    top_p: f32[B]; 1 keeps all tokens.

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
  return jax.lax.cond(
    jnp.any(top_p < 1),
    lambda: _nucleus(blocks, candidates, top, temperature, min_logit, top_p),
    lambda: (min_logit, jnp.zeros_like(top)),
  )


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

  def weigh(logits):
    kept = logits >= _row(min_logit, logits)
    return jnp.where(kept, _weights(logits, top, temperature), 0.0)

  weights, candidate_weights = weigh(blocks), weigh(candidates.blocks)
  total = _total(_sum(weights))
  target = p * total
  # All weights below `low` together sum to less than half of the mass outside the nucleus.
  low = jnp.maximum((1 - p) * total / (2 * blocks[0].size), TINY)
  one = jnp.ones_like(low)
  rest_weight = _weights(candidates.rest, top, temperature)
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
    logits = jnp.where(weights == _row(min_weight, weights), blocks, -jnp.inf)
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
  kept = values >= _row(threshold, values)
  return _total(_sum(jnp.where(kept, 1.0 if masses is None else masses, 0.0)))


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
