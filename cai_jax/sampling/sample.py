"""Draw one token per row from logits, with two levels of Gumbel noise.

Logits f32[B,V] are viewed as blocks [B,N,S]. The block with the largest log of its summed weights
plus Gumbel noise is drawn, and then the entry in it with the largest score plus fresh noise. This
draws from exactly the softmax of the scores (`cai_jax/sampling/noise.py`), but needs N + S random
numbers instead of V. Rounding changes the scores by little, and so rarely changes a token.

No step sorts the vocabulary. A draw without filters reads the logits twice, for the maximum and for
the sum of each block. A filter keeps the logits above a threshold (`cai_jax/sampling/filters.py`);
the sums then count kept entries only.

The order is that of `sample`. To add a filter or a penalty:

1. Add its setting to `SamplingConfig` in `cai_jax/sampling/types.py`, with a default that turns it
   off and `added=True`. The journal's key then contains it only if it is on, so that existing
   journals stay valid.
2. A filter, such as min-p: add an array to `Slots` in `cai_jax/sampling/step_arrays.py`, set it in
   `Slots.empty` and `Slots.start`, and pass it to `sample` in `cai_jax/sampling/burst.py:_sample`.
   Apply it in `thresholds`, or as one more condition in `kept_by`.
3. A penalty, such as the frequency penalty: add an array to `Penalties` in
   `cai_jax/sampling/penalties.py`, set it in `Penalties.off` and `Penalties.start`, and apply it in
   `penalize`. Say in `SamplingConfig.changes_logits` when it is on: a program without penalties
   then costs nothing. The returned log-probabilities stay the model's own.
4. Each row must depend on its own settings alone.
5. If servers support it, send it in `cai_jax/sampling/remote/protocol.py:request_body` and name it
   in `Server.settings`; `RemoteConfig.check_sampling` refuses it for all other servers.

If the same settings draw other tokens than before, give the sampler another name in
`cai_jax/sampling/noise.py`.

Axes: B rows, V vocabulary, N blocks, S entries of a block.
"""

import jax
import jax.numpy as jnp

from cai_jax.model.precision import sum_entries
from cai_jax.sampling.blocks import (
  piece_count,
  scale,
  sum_blocks,
  take_block,
  to_blocks,
  token_at,
  weigh,
)
from cai_jax.sampling.filters import LOWEST, kept_by, thresholds
from cai_jax.sampling.noise import gumbel

BLOCK_LEVEL, ENTRY_LEVEL = 0, 1  # of the noise


def sample(
  logits: jax.Array,
  keys: jax.Array,
  temperature: jax.Array,
  top_k: jax.Array,
  top_p: jax.Array,
  min_p: jax.Array,
  adjusted: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Draw one token per row: biases and penalties, temperature, top-k, top-p, then min-p.

  This is the order of vLLM, and of Hugging Face with min-p after top-p. The caller applies biases
  and penalties (`cai_jax/sampling/penalties.py`). If no row uses a filter, filters take no time.

  Args:
    logits: f32[B,V], of the model.
    keys: u32[B,2], the only randomness, from `token_keys`.
    temperature: f32[B]; 0 picks the most likely token.
    top_k: i32[B]; 0 keeps all tokens.
    top_p: f32[B] in (0, 1].
    min_p: f32[B] in [0, 1]; 0 keeps all tokens.
    adjusted: f32[B,V], the logits after biases and penalties; None stands for `logits`.

  Returns:
    Tokens i32[B], and their log-probabilities f32[B] under the model itself: log softmax(logits),
    before biases, penalties, temperature and filters.
  """
  greedy = temperature <= 0
  top_k, top_p = jnp.where(greedy, 0, top_k), jnp.where(greedy, 1.0, top_p)
  min_p = jnp.where(greedy, 0.0, min_p)
  temperature = jnp.where(greedy, 1.0, temperature)
  blocks = to_blocks(logits if adjusted is None else adjusted)
  block_max = blocks.max(-1)
  top = block_max.max(-1)
  unfiltered_sums = sum_entries(weigh(blocks, top, temperature))
  has_filter = (top_k > 0) | (top_p < 1) | (min_p > 0)

  def filtered():
    min_logit, min_weight = thresholds(blocks, block_max, temperature, top_k, top_p, min_p)
    weights = weigh(blocks, top, temperature)
    kept = kept_by(blocks, weights, min_logit, min_weight)
    sums = sum_entries(jnp.where(kept, weights, 0.0))
    # A row without a filter uses the same sums, to the bit, whether or not other rows have one.
    return min_logit, min_weight, jnp.where(has_filter[:, None], sums, unfiltered_sums)

  def unfiltered():
    return jnp.full_like(top, LOWEST), jnp.zeros_like(top), unfiltered_sums

  min_logit, min_weight, sums = jax.lax.cond(jnp.any(has_filter), filtered, unfiltered)
  scores = jnp.log(sums) + gumbel(keys, BLOCK_LEVEL, sums.shape[1])
  block = _argmax(jnp.where(greedy[:, None], block_max, scores))
  entries = take_block(blocks, block)
  kept = kept_by(entries, weigh(entries, top, temperature), min_logit, min_weight)
  scores = scale(entries, top, temperature) + gumbel(keys, ENTRY_LEVEL, entries.shape[1])
  scores = jnp.where(kept, scores, -jnp.inf)
  entry = _argmax(jnp.where(greedy[:, None], entries, scores))
  token = token_at(block, entry, logits.shape[1])
  if adjusted is not None:
    blocks = to_blocks(logits)
    entries, top = take_block(blocks, block), blocks.max(-1).max(-1)

  def plain_total():
    return sum_blocks(sum_entries(weigh(blocks, top, jnp.ones_like(temperature))))

  if adjusted is not None:
    total = plain_total()
  else:
    scaled_total = sum_blocks(unfiltered_sums)
    total = jax.lax.cond(jnp.any(temperature != 1), plain_total, lambda: scaled_total)
    total = jnp.where(temperature == 1, scaled_total, total)
  logit = jnp.take_along_axis(entries, entry[:, None], -1)[:, 0]
  return token, logit - top - jnp.log(total)


def keep_mask(logits: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
  """Return the mask of tokens that top-k, then top-p, then min-p keep.

  Top-k (Fan et al. 2018) keeps the k largest logits and any equal to the k-th. Top-p (Holtzman et
  al. 2020) sorts the remaining tokens by probability, keeps the shortest prefix whose mass reaches
  p, and any token as likely as the last one. Min-p (Nguyen et al. 2024) keeps the tokens that are
  at least p times as likely as the most likely one. That one is always kept, and a logit of -inf
  never is. Masses are f32 sums. If the mass of a set equals p to within rounding, the result
  may differ from exact arithmetic by one token, but it is always the same for the same row.

  Args:
    logits: f32[B,V].
    top_k: i32[B]; 0 keeps all tokens.
    top_p: f32[B]; 1 keeps all tokens.
    min_p: f32[B]; 0 keeps all tokens.

  Returns:
    bool[B,V].
  """
  blocks = to_blocks(logits)
  block_max, temperature = blocks.max(-1), jnp.ones(len(logits))
  min_logit, min_weight = thresholds(
    blocks, block_max, temperature, *map(jnp.asarray, (top_k, top_p, min_p))
  )
  weights = weigh(blocks, block_max.max(-1), temperature)
  kept = kept_by(blocks, weights, min_logit, min_weight)
  count = piece_count(logits.shape[1])
  pieces = kept.reshape(len(logits), count, -1)[:, :, : logits.shape[1] // count]
  return pieces.reshape(logits.shape)


def _argmax(x: jax.Array) -> jax.Array:
  """Return the index i32[B] of the first largest entry of each row of x f32[B,N].

  On CPUs, XLA's own argmax computes x in a scalar loop, which makes a draw 1.3 times as slow.
  """
  index = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
  return jnp.min(jnp.where(x >= x.max(-1, keepdims=True), index, x.shape[1] - 1), -1)
