"""Drawing one token a row from logits: temperature, top-k, top-p, and one uniform number a row.

No step sorts the vocabulary or draws a number for each of its entries. Logits f32[B,V] are seen as
blocks [B,N,S]; an unfiltered draw reads them twice, for the maximum and for the sum of each block.
A filter is a threshold, found by bisection over the bit patterns of floats, which ends on the exact
set: in the few blocks with the largest maxima where these suffice for a row, else in all of them.
"""

import math

import jax
import jax.numpy as jnp

BLOCK = 128  # vocabulary entries summed together before the search for the drawn one
PIECES = 16  # that a large vocabulary is cut into before its blocks: a mesh may split it so
LARGE = 2**14  # entries from which it is
BEST = 64  # blocks with the largest maxima, where a filter looks first
LOWEST = jnp.finfo(jnp.float32).min  # under every logit but -inf
TINY = jnp.finfo(jnp.float32).tiny  # the least weight that a search tells from 0


def uniforms(keys: jax.Array, index: jax.Array) -> jax.Array:
  """f32[B] in [0, 1): a pure function of each row's key u32[B,2] and of index i32[B].

  They are multiples of 2^-23, so that probabilities are met to within that: a token much less
  likely is drawn more rarely than it should be, or never. The generator is named, so that no
  setting of the environment changes a text.
  """

  def one(key, i):
    key = jax.random.wrap_key_data(key, impl='threefry2x32')
    return jax.random.uniform(jax.random.fold_in(key, i))

  with jax.threefry_partitionable(True):
    return jax.vmap(one)(keys, index)


def keep_mask(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
  """bool[B,V]: the tokens that top-k i32[B] and then top-p f32[B] leave of logits f32[B,V].

  top-k (Fan et al. 2018) keeps the k largest logits, and any equal to the k-th; 0 keeps all. top-p
  (Holtzman et al. 2020) keeps, of those, the shortest prefix by falling probability whose mass
  reaches p, and any equal to its last; 1 keeps all. The most likely token always stays, one of
  logit -inf never. Masses are f32 sums: a set whose mass is p to within their rounding may end one
  token sooner or later than in exact arithmetic, but always the same way for the same row.
  """
  blocks = _blocked(logits, -jnp.inf)
  tops, heat = blocks.max(-1), jnp.ones(len(logits))
  kth, least = _thresholds(blocks, tops, heat, jnp.asarray(top_k), jnp.asarray(top_p))
  kept = _kept(blocks, _weights(blocks, tops.max(-1), heat), kth, least)
  count = _pieces(logits.shape[1])
  pieces = kept.reshape(len(logits), count, -1)[:, :, : logits.shape[1] // count]
  return pieces.reshape(logits.shape)


def inverse_cdf(weights: jax.Array, u: jax.Array) -> jax.Array:
  """i32[B]: the token at which the running sum of weights f32[B,V] passes u f32[B] of the total.

  Searched in two levels, blocks and then entries of one block, so that no running sum goes over
  the whole vocabulary. A token of weight 0 is never drawn.
  """
  blocks = _blocked(weights, 0.0)
  block, start, target = _draw_block(_sum(blocks), u)
  entry = _draw_entry(_take(blocks, block), start, target)
  return _token(block, entry, weights.shape[1])


def sample(
  logits: jax.Array,
  u: jax.Array,
  temperature: jax.Array,
  top_k: jax.Array,
  top_p: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Tokens i32[B] and their log-probabilities f32[B].

  Args:
    logits: f32[B,V].
    u: f32[B] in [0, 1), the only randomness.
    temperature: f32[B]; 0 takes the most likely token.
    top_k: i32[B]; 0 keeps every token.
    top_p: f32[B] in (0, 1].

  The log-probability is the model's own: log softmax(logits), before temperature and filters.
  Filters cost nothing where no row asks for one.
  """
  greedy = temperature <= 0
  top_k, top_p = jnp.where(greedy, 0, top_k), jnp.where(greedy, 1.0, top_p)
  heat = jnp.where(greedy, 1.0, temperature)
  blocks = _blocked(logits, -jnp.inf)
  tops = blocks.max(-1)
  top = tops.max(-1)
  all_sums = _sum(_weights(blocks, top, heat))

  def filtered():
    kth, least = _thresholds(blocks, tops, heat, top_k, top_p)
    weights = _weights(blocks, top, heat)
    kept = _kept(blocks, weights, kth, least)
    # A row without a filter takes the sums it has without filtering mates, to the last bit.
    unlike = ((top_k > 0) | (top_p < 1))[:, None]
    return kth, least, jnp.where(unlike, _sum(jnp.where(kept, weights, 0.0)), all_sums)

  def unfiltered():
    return jnp.full_like(top, LOWEST), jnp.zeros_like(top), all_sums

  kth, least, sums = jax.lax.cond(jnp.any((top_k > 0) | (top_p < 1)), filtered, unfiltered)
  block, start, target = _draw_block(sums, u)
  block = jnp.where(greedy, jnp.argmax(tops, -1), block)
  inside = _take(blocks, block)
  weights = _weights(inside, top, heat)
  weights = jnp.where(_kept(inside, weights, kth, least), weights, 0.0)
  entry = jnp.where(greedy, jnp.argmax(inside, -1), _draw_entry(weights, start, target))
  chosen = jnp.take_along_axis(inside, entry[:, None], -1)[:, 0] - top
  own = _total(all_sums)
  cool = jax.lax.cond(
    jnp.any(heat != 1),
    lambda: _total(_sum(_weights(blocks, top, jnp.ones_like(heat)))),
    lambda: own,
  )
  total = jnp.where(heat == 1, own, cool)
  return _token(block, entry, logits.shape[1]), chosen - jnp.log(total)


def _blocked(rows: jax.Array, filler: float) -> jax.Array:
  """[B,N,S]: rows [B,V] cut into pieces and these into blocks, the last of a piece filled up.

  Without pieces blocks would lie across the devices that a vocabulary of 1,002 blocks is split over
  by four, and GSPMD would have each compute the logits of half of it instead.
  """
  count = _pieces(rows.shape[1])
  pieces = rows.reshape(len(rows), count, -1)
  short = -pieces.shape[2] % BLOCK
  if short:
    pieces = jnp.pad(pieces, ((0, 0), (0, 0), (0, short)), constant_values=filler)
  return pieces.reshape(len(rows), -1, BLOCK)


def _pieces(size: int) -> int:
  return math.gcd(size, PIECES) if size >= LARGE else 1


def _token(block: jax.Array, entry: jax.Array, size: int) -> jax.Array:
  """i32[B]: the token at an entry of a block, of a vocabulary of so many."""
  piece = size // _pieces(size)
  blocks = -(-piece // BLOCK)
  return (block // blocks * piece + block % blocks * BLOCK + entry).astype(jnp.int32)


def _take(blocks: jax.Array, block: jax.Array) -> jax.Array:
  """[B,S]: of each row of blocks [B,N,S] the one that block i32[B] names."""
  return jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0]


def _row(per_row: jax.Array, like: jax.Array) -> jax.Array:
  """per_row [B] with axes of length 1 up to the rank of like."""
  return per_row.reshape(-1, *[1] * (like.ndim - 1))


def _sum(x: jax.Array) -> jax.Array:
  """x f32[...,N] summed over its last axis.

  XLA's own sums on a CPU add up in an order that changes with the other axes, and so with the
  number of rows. There halves are added to halves, which is as fast, and faster than it of a mask.
  """

  def halves(x):
    while x.shape[-1] > 1:
      odd = x.shape[-1] % 2
      x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)]) if odd else x
      x = x[..., : x.shape[-1] // 2] + x[..., x.shape[-1] // 2 :]
    return x[..., 0]

  return jax.lax.platform_dependent(x, cpu=halves, default=lambda x: x.sum(-1))


def _total(sums: jax.Array) -> jax.Array:
  """f32[B]: the sums f32[B,N] of blocks added up, on a CPU in an order that only N decides."""
  return jax.lax.platform_dependent(
    sums, cpu=lambda x: jnp.cumsum(x, -1)[:, -1], default=lambda x: x.sum(-1)
  )


def _weights(logits: jax.Array, top: jax.Array, heat: jax.Array) -> jax.Array:
  """exp((logits - top) / heat), top and heat f32[B]: 1 for the most likely token."""
  return jnp.exp((logits - _row(top, logits)) / _row(heat, logits))


def _draw_block(sums: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The drawn block i32[B], the sum before it and the sum looked for f32[B]; sums f32[B,N]."""
  ends = jnp.cumsum(sums, -1)
  target = u * ends[:, -1]
  block = _passed(ends, sums, target)
  start = jnp.take_along_axis(ends - sums, block[:, None], 1)[:, 0]
  return block, start, target


def _draw_entry(weights: jax.Array, start: jax.Array, target: jax.Array) -> jax.Array:
  """i32[B]: where the running sum of weights f32[B,S] from start passes target."""
  return _passed(start[:, None] + jnp.cumsum(weights, -1), weights, target)


def _passed(ends: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
  """i32[B]: the first place whose running sum `ends` passes target and that has weight.

  Rounding may leave the place on an entry of weight 0, or past the last: then the next entry that
  has weight is taken, or the last one.
  """
  place, there = jnp.arange(weights.shape[-1], dtype=jnp.int32), weights > 0
  last = jnp.max(jnp.where(there, place, 0), -1)
  at = jnp.minimum(jnp.sum(ends <= target[:, None], -1, dtype=jnp.int32), last)
  return jnp.min(jnp.where(there & (place >= at[:, None]), place, last[:, None]), -1)


def _kept(logits: jax.Array, weights: jax.Array, kth: jax.Array, least: jax.Array) -> jax.Array:
  """bool, as logits: at or over the thresholds f32[B] of logit and of weight."""
  return (logits >= _row(kth, logits)) & (weights >= _row(least, logits))


def _thresholds(
  blocks: jax.Array, tops: jax.Array, heat: jax.Array, top_k: jax.Array, top_p: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The least logit and the least weight that top-k and then top-p keep, f32[B] each.

  blocks: f32[B,N,S] logits; tops: f32[B,N] their maxima.
  """
  top = tops.max(-1)
  near = _best_blocks(blocks, tops)
  kth = jax.lax.cond(
    jnp.any(top_k > 0),
    lambda: _kth(blocks, near, top, top_k),
    lambda: jnp.full_like(top, LOWEST),
  )
  return jax.lax.cond(
    jnp.any(top_p < 1),
    lambda: _nucleus(blocks, near, top, heat, kth, top_p),
    lambda: (kth, jnp.zeros_like(top)),
  )


def _best_blocks(blocks: jax.Array, tops: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The blocks f32[B,M,S] where a filter looks first, their maxima by fall, and the next maximum.

  No entry elsewhere is over the next maximum, f32[B]: a threshold over it, found among these
  blocks, is the one of the whole row. With few blocks they are all here, and the next is -inf.
  """
  if blocks.shape[1] <= BEST:
    return blocks, -jnp.sort(-tops, -1), jnp.full(len(tops), -jnp.inf)
  highest, index = jax.lax.top_k(tops, BEST + 1)
  best = jnp.take_along_axis(blocks, index[:, :BEST, None], 1)
  return best, highest[:, :BEST], highest[:, BEST]


def _kth(blocks: jax.Array, near: tuple, top: jax.Array, k: jax.Array) -> jax.Array:
  """f32[B]: a threshold that keeps the k-th largest logit and all over it; LOWEST for k = 0."""
  best, highest, _ = near
  count = best.shape[1]
  # The k largest maxima are k entries: the k-th largest entry is no less than the last of them.
  low = jnp.take_along_axis(highest, jnp.clip(k - 1, 0, count - 1)[:, None], 1)[:, 0]
  low = jnp.where(k <= count, jnp.maximum(low, LOWEST), LOWEST)
  close = (k > 0) & ((k <= count) | (count == blocks.shape[1]))
  found, _ = _search(best, None, k.astype(jnp.float32), low, top, close)
  far = (k > 0) & ~close
  found = _where(far, lambda: _search(blocks, None, k.astype(jnp.float32), low, top, far)[0], found)
  return jnp.where(k > 0, found, LOWEST)


def _nucleus(
  blocks: jax.Array, near: tuple, top: jax.Array, heat: jax.Array, kth: jax.Array, p: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The thresholds f32[B] of logit and weight that keep the nucleus of what is at or over kth."""
  best, _, rest = near

  def weigh(logits):
    return jnp.where(logits >= _row(kth, logits), _weights(logits, top, heat), 0.0)

  weights, best = weigh(blocks), weigh(best)
  total = _total(_sum(weights))
  target = p * total
  # What weighs less than `low` is, all together, less than half of 1 - p.
  low = jnp.maximum((1 - p) * total / (2 * blocks[0].size), TINY)
  one = jnp.ones_like(low)
  outside = _weights(rest, top, heat)
  start = jnp.where(kth > rest, low, jnp.maximum(low, _float(_order(outside) + 1)))
  close = (p < 1) & (_above(best, best, start) >= target)
  least, spare = _search(best, best, target, start, one, close)
  far = (p < 1) & ~close
  least, spare = _where(
    far, lambda: _search(weights, weights, target, low, one, far), (least, spare)
  )
  # Weights may be equal in f32 where the logits are not. The least of these are not needed.
  tied = (p < 1) & (spare >= least)

  def cut():
    logits = jnp.where(weights == _row(least, weights), blocks, -jnp.inf)
    lowest = jnp.full_like(top, LOWEST)
    needed = jnp.maximum(_above(logits, None, lowest) - jnp.floor(spare / least), 1.0)
    return _search(logits, None, needed, lowest, top, tied)[0]

  return _where(tied, cut, kth), jnp.where(p < 1, least, 0.0)


def _where(rows: jax.Array, new, old):
  """new() in the rows bool[B] and old elsewhere; new is not computed where no row needs it."""
  choose = lambda a, b: jnp.where(rows, a, b)  # noqa: E731
  return jax.lax.cond(jnp.any(rows), lambda: jax.tree.map(choose, new(), old), lambda: old)


def _above(values: jax.Array, masses: jax.Array | None, threshold: jax.Array) -> jax.Array:
  """f32[B]: the masses of the entries of values f32[B,N,S] at or over the threshold, summed."""
  there = values >= _row(threshold, values)
  return _total(_sum(jnp.where(there, 1.0 if masses is None else masses, 0.0)))


def _search(
  values: jax.Array,
  masses: jax.Array | None,
  target: jax.Array,
  low: jax.Array,
  high: jax.Array,
  wanted: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """The threshold that keeps the fewest entries whose mass reaches target, and the mass to spare.

  Args:
    values: f32[B,N,S].
    masses: the same array where an entry's mass is its value; None where it is 1.
    target: f32[B].
    low, high: f32[B], bounds of the threshold, both inclusive. Where even low falls short of the
      target, low is the answer.
    wanted: bool[B], the rows to search for; the others' result means nothing.

  Bisects over the bit patterns of floats, in at most 32 steps. As the summation has one order, the
  mass never rises with the threshold. A row is done when its bounds are neighbours, or when to
  give up any one entry more would miss the target. Each row's course depends on itself alone.
  """

  def searching(low, spare, high):
    return (low < high - 1) & (spare >= (1.0 if masses is None else _float(low)))

  def halve(state):
    low, spare, high = state
    going = searching(*state)
    middle = (low >> 1) + (high >> 1) + (low & high & 1)
    over = _above(values, masses, _float(middle)) - target
    up, down = going & (over >= 0), going & (over < 0)
    return jnp.where(up, middle, low), jnp.where(up, over, spare), jnp.where(down, middle, high)

  spare = _above(values, masses, low) - target
  low, high = _order(low), _order(high) + 1
  state = low, spare, jnp.where(wanted, high, low)
  low, spare, _ = jax.lax.while_loop(lambda state: jnp.any(searching(*state)), halve, state)
  return _float(low), spare


def _order(x: jax.Array) -> jax.Array:
  """i32: integers in the order of the floats f32."""
  bits = jax.lax.bitcast_convert_type(x, jnp.int32)
  return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _float(order: jax.Array) -> jax.Array:
  """f32: the floats that `_order` takes to these integers."""
  return jax.lax.bitcast_convert_type(order ^ ((order >> 31) & 0x7FFFFFFF), jnp.float32)
