"""What a step does before and after the model: it drafts, feeds, samples and keeps tokens.

A row may add drafted tokens to its next one (`cai_jax/sampling/drafts.py`). The step then samples
after each of them, and keeps those that agree.

`cai_jax.sampling.step_arrays` defines the axis letters.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cai_jax.model.cached_forward import hidden_logits
from cai_jax.model.transformer import Params
from cai_jax.runtime.mesh import batch_shards
from cai_jax.sampling.drafts import count_kept, find_drafts
from cai_jax.sampling.noise import token_keys
from cai_jax.sampling.penalties import (
  Counts,
  Penalties,
  add_tokens,
  count_drafts,
  count_tokens,
  penalize,
)
from cai_jax.sampling.sample import sample
from cai_jax.sampling.step_arrays import Array, Burst, Chunk, ModelSpec, Sizes, Slots, runs_in_parts

Limits = tuple[jax.Array, jax.Array]  # as in `cai_jax.sampling.device.run`


class State(NamedTuple):
  """What a burst carries from step to step, besides the cache.

  Attributes:
    rows: the state of the rows.
    burst: the result so far.
    counts: the tokens of each row, for penalties; None without.
    text: i32[B,L], context and reply of each row, for drafts and penalties; None without.
    unfinished: bool[], whether the burst goes on.
  """

  rows: Slots
  burst: Burst
  counts: Counts | None
  text: Array
  unfinished: jax.Array


@functools.partial(jax.jit, static_argnames=('spec', 'sizes'))
def begin(
  spec: ModelSpec,
  sizes: Sizes,
  rows: Slots,
  limits: Limits,
  penalties: Penalties | None,
  text: Array,
) -> State:
  """Return the state before the first step; the arguments are those of `device.run`."""
  b, counts = len(rows.token), None
  if penalties is not None:
    counts = count_tokens(text, rows.position, rows.sampled, spec.config.vocab_size)
  zeros = jnp.zeros((b,), jnp.int32)
  capacity = sizes.burst + sizes.drafts  # the last step may begin one token before the limit
  burst = Burst(
    tokens=jnp.zeros((b, capacity), jnp.int32),
    logprobs=jnp.zeros((b, capacity), jnp.float32),
    num_sampled=zeros,
    active=rows.active,
    steps=jnp.zeros((), jnp.int32),
    row_steps=zeros,
  )
  unfinished = _is_unfinished(burst, rows.active, limits)
  return _place(spec, State(rows, burst, counts, text, unfinished))


def _is_unfinished(burst: Burst, active_at_start: jax.Array, limits: Limits) -> jax.Array:
  """Return bool[], whether a burst goes on."""
  ended, longest = jnp.sum(active_at_start & ~burst.active), jnp.max(burst.num_sampled)
  return (longest < limits[1]) & (ended < limits[0]) & jnp.any(burst.active)


def _place(spec: ModelSpec, state: State) -> State:
  """Return the state with the same sharding from `begin` and from `take`.

  With different ones, the programs that follow would be compiled twice.
  """
  if not runs_in_parts(spec.mesh):
    return state
  return jax.lax.with_sharding_constraint(state, NamedSharding(spec.mesh, P()))


@functools.partial(jax.jit, static_argnames=('spec', 'sizes'))
def feed(
  spec: ModelSpec, sizes: Sizes, state: State, chunk: Chunk | None
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """Return what a step feeds to the model.

  Args:
    spec: the properties for which the model is compiled.
    sizes: static sizes.
    state: the state before the step.
    chunk: the tokens to prefill, or None.

  Returns:
    The drafts i32[B,W-1]; and tokens, positions and chosen prefixes, each i32[G,D·W+T].
  """
  rows, groups = state.rows, batch_shards(spec.mesh)
  draft = jnp.zeros((len(rows.token), 0), jnp.int32)
  if sizes.drafts:
    draft = find_drafts(state.text, rows.position, sizes.drafts)
  fed = jnp.concatenate([rows.token[:, None], draft], 1)
  split = lambda x: x.reshape(groups, -1)  # noqa: E731
  ahead = jnp.arange(fed.shape[1])
  # No drafted token is fed if the reply could not go on after it; there may be no page for it.
  useful = rows.active[:, None] & (ahead < (rows.limit - rows.sampled)[:, None])
  tokens, positions = [split(fed)], [split(jnp.where(useful, rows.position[:, None] + ahead, -1))]
  choice = [split(jnp.broadcast_to(rows.prefix[:, None], fed.shape))]
  if chunk is not None:
    tokens.append(chunk.tokens)
    positions.append(chunk.positions)
    choice.append(chunk.prefix)
  return draft, tuple(jnp.concatenate(x, 1) for x in (tokens, positions, choice))


@functools.partial(jax.jit, static_argnames='sizes')
def select_hidden(sizes: Sizes, hidden: jax.Array, draft: jax.Array) -> jax.Array:
  """Return those of the hidden states [G,X,D] for which the output layer computes logits."""
  decoded = draft.shape[0] // len(hidden) * (draft.shape[1] + 1)
  return hidden[:, : max(decoded, sizes.least)]


@functools.partial(jax.jit, static_argnames=('spec', 'sizes'), donate_argnames='state')
def take(
  spec: ModelSpec,
  sizes: Sizes,
  params: Params,
  hidden: jax.Array,
  draft: jax.Array,
  state: State,
  penalties: Penalties | None,
  active_at_start: jax.Array,
  limits: Limits,
) -> State:
  """Return the state after a step: with the tokens that it sampled and kept.

  Args:
    spec: the properties for which the model is compiled.
    sizes: static sizes.
    params: the model's parameters outside of its layers.
    hidden: [G,X,D], the hidden states that `select_hidden` returned.
    draft: i32[B,W-1], the drafted tokens.
    state: the state before the step; donated.
    penalties: biases and penalties; None if there are none.
    active_at_start: bool[B], the rows that were active when the burst began.
    limits: those of `device.run`.
  """
  rows, burst, counts, text, _ = state
  b, width = len(rows.token), 1 + sizes.drafts
  logits = hidden_logits(spec.config, params, hidden.reshape(-1, hidden.shape[-1]))
  logits = logits.reshape(len(hidden), -1, logits.shape[-1])[:, : b * width // len(hidden)]
  token, logprob = _sample(logits.reshape(b * width, -1), rows, draft, penalties, counts)
  kept, ended = _count_taken(rows, draft, token)
  index = jnp.arange(width)
  taken = index < kept[:, None]
  if counts is not None:
    counts = add_tokens(counts, token, taken)

  def put(x, first, new):
    place = jnp.where(taken, first[:, None] + index, x.shape[1])
    return x.at[jnp.arange(b)[:, None], place].set(new, mode='drop')

  burst = Burst(
    tokens=put(burst.tokens, burst.num_sampled, token),
    logprobs=put(burst.logprobs, burst.num_sampled, logprob),
    num_sampled=burst.num_sampled + kept,
    active=rows.active & ~ended,
    steps=burst.steps + 1,
    row_steps=burst.row_steps + rows.active,
  )
  if sizes.drafts:
    text = put(text, rows.position + 1, token)
  newest = jnp.take_along_axis(token, jnp.maximum(kept - 1, 0)[:, None], 1)[:, 0]
  rows = rows._replace(
    token=jnp.where(rows.active, newest, rows.token),
    position=rows.position + kept,
    sampled=rows.sampled + kept,
    active=burst.active,
  )
  unfinished = _is_unfinished(burst, active_at_start, limits)
  return _place(spec, State(rows, burst, counts, text, unfinished))


def _count_taken(rows: Slots, draft: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Return how many sampled tokens each row keeps, i32[B], and whether its reply ends, bool[B].

  Tokens after one that ends the reply are dropped, as are those after a wrong draft.

  Args:
    rows: the state of the rows before the step.
    draft: i32[B,W-1], the drafted tokens.
    token: i32[B,W], the sampled tokens.
  """
  width = token.shape[1]
  number = rows.sampled[:, None] + jnp.arange(1, width + 1)
  ends = jnp.any(token[:, :, None] == rows.stops[:, None], -1) | (number >= rows.limit[:, None])
  last = jnp.min(jnp.where(ends, jnp.arange(width), width), 1)  # index of the reply's last token
  kept = jnp.where(rows.active, jnp.minimum(count_kept(draft, token), last + 1), 0)
  return kept, kept > last


def _sample(logits, rows, draft, penalties, counts):
  """Return the token sampled after each token that was fed, and its log-probability.

  Args:
    logits: f32[B·W,V].
    rows: the state of the rows before the step.
    draft: i32[B,W-1], the drafted tokens.
    penalties: biases and penalties; None if there are none.
    counts: the tokens of each row before the step; None if there are no penalties.

  Returns:
    i32[B,W] and f32[B,W].
  """
  b, width = len(draft), draft.shape[1] + 1
  flat = lambda x: x.reshape(b * width, *x.shape[2:])  # noqa: E731
  repeat = lambda x: jnp.repeat(x, width, 0, total_repeat_length=b * width)  # noqa: E731
  keys = token_keys(repeat(rows.key), flat(rows.sampled[:, None] + jnp.arange(width)))
  adjusted = None
  if penalties is not None:
    each = jax.tree.map(flat, count_drafts(counts, draft))
    adjusted = penalize(logits, jax.tree.map(repeat, penalties), each)
  settings = map(repeat, (rows.temperature, rows.top_k, rows.top_p, rows.min_p))
  token, logprob = sample(logits, keys, *settings, adjusted)
  return token.reshape(b, width), logprob.reshape(b, width)
