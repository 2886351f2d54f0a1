"""Drafts of the next tokens, looked up in a row's own text.

A revision mostly copies the response under revision, and chains repeat themselves. So the tokens
that followed an earlier occurrence of the last ones are a good guess of what comes next (prompt
lookup decoding: Saxena 2023; Yang et al. 2023, "Inference with reference"). The step verifies the
guess: it samples at every drafted position, and keeps what agrees (`cai_jax/sampling/burst.py`).

A sampled token is a pure function of its logits and of (seed, prompt id, turn, position). A drafted
token is therefore kept exactly if it is the token that would have been sampled without drafts, at
any temperature, and no text depends on them. Rejection sampling (Leviathan et al. 2023), which
keeps only the distribution, is not needed.

Axes: B rows, L positions, W tokens of a row in a step: its last token, then W - 1 drafted ones.
"""

import jax
import jax.numpy as jnp

KEY = 3  # the largest number of last tokens that are looked up


def find_drafts(text: jax.Array, position: jax.Array, count: int) -> jax.Array:
  """Return the tokens that followed the best earlier occurrence of each row's last tokens.

  The best occurrence agrees in the most of the last `KEY` tokens, and of those it is the latest. If
  it is nearer than `count` tokens, the draft repeats what lies between.

  Args:
    text: i32[B,L], context and reply of each row. Entries beyond its position are not used.
    position: i32[B], position of the last token.
    count: number of tokens to draft.

  Returns:
    i32[B,count]. A row whose last token is new repeats it.
  """

  def find(text, position):
    length = len(text)
    index = jnp.arange(length)
    agrees = index < position
    score = jnp.zeros_like(index)
    for back in range(min(KEY, length)):
      last = text.at[position - back].get(mode='fill', fill_value=-1)
      agrees &= (jnp.roll(text, back) == last) & (index >= back)
      score += agrees
    # One maximum finds the best score, and of those the latest position.
    best = jnp.max(jnp.where(score > 0, score * length + index, -1))
    best = jnp.where(best < 0, position - 1, best % length)
    ahead = jnp.arange(count) % jnp.maximum(position - best, 1)
    return text.at[best + 1 + ahead].get(mode='clip')

  return jax.vmap(find)(text, position)


def count_kept(draft: jax.Array, sampled: jax.Array) -> jax.Array:
  """Return how many tokens of each row's step are kept.

  The first sampled token follows a token that is certain. Each later one follows a drafted token,
  and is kept if that token and all before it agree with what was sampled.

  Args:
    draft: i32[B,W-1], the drafted tokens.
    sampled: i32[B,W], the token sampled after each token that was fed.

  Returns:
    i32[B], from 1 to W.
  """
  agrees = draft == sampled[:, : draft.shape[1]]
  return 1 + jnp.cumprod(agrees.astype(jnp.int32), -1).sum(-1)
