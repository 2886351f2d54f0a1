"""The compiled step, its inputs and its outputs.

A step is one pass of the model over a flat batch of tokens: the next token of each decoded row, and
prefilled tokens of rows that wait. A row is a slot that takes part; there are programs for a few
numbers of rows, so that idle slots cost little. Without prefill, a burst of steps runs.

On one CPU device a step runs as several programs: `_begin`, `_feed`, those of
`cai_jax.model.cached_forward`, and `_take`. Elsewhere the whole burst is a single program, because
each start of a program costs time on the host.

A row may add drafted tokens to its next one (`cai_jax/sampling/drafts.py`). The step then samples
after each of them, and keeps those that agree.

Axes: B rows, W tokens of a row in a step, U tokens of a row in a burst; G batch shards, D rows of a
shard (B = G · D) and T prefilled tokens of a shard.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cai_jax.model.cache import (
  Cache,
  Pieces,
  PieceTable,
  Prefix,
  Prefixes,
  RowTable,
  Step,
  windows_of,
)
from cai_jax.model.cached_forward import ForwardSpec, compute_logits, forward_cached
from cai_jax.model.config import ModelConfig
from cai_jax.model.lm import LM
from cai_jax.model.transformer import Params
from cai_jax.runtime.mesh import batch_sharding, batch_shards
from cai_jax.sampling.caches import allocate_prefix, runs_in_parts
from cai_jax.sampling.drafts import count_kept, find_drafts
from cai_jax.sampling.noise import token_keys
from cai_jax.sampling.penalties import Penalties, add_tokens, count_drafts, count_tokens, penalize
from cai_jax.sampling.sample import sample
from cai_jax.sampling.types import MAX_STOP_TOKENS, SamplingConfig


class Slots(NamedTuple):
  """The state of all slots, or of the rows of a step; it is kept on the host.

  Attributes:
    token: i32[B], the last token of context and reply, which is not in the cache yet.
    position: i32[B], position of `token`.
    prefix: i32[B], index of the shared prefix that the context starts with; -1 means none.
    active: bool[B], whether the slot is sampling a reply.
    sampled: i32[B], number of tokens sampled for the reply so far.
    limit: i32[B], maximum number of tokens of the reply.
    key: u32[B,2], random key of the turn.
    temperature: f32[B].
    top_k: i32[B].
    top_p: f32[B].
    min_p: f32[B].
    stops: i32[B,MAX_STOP_TOKENS], tokens that end the reply, padded with -1.
  """

  token: np.ndarray
  position: np.ndarray
  prefix: np.ndarray
  active: np.ndarray
  sampled: np.ndarray
  limit: np.ndarray
  key: np.ndarray
  temperature: np.ndarray
  top_k: np.ndarray
  top_p: np.ndarray
  min_p: np.ndarray
  stops: np.ndarray

  @classmethod
  def empty(cls, count: int) -> 'Slots':
    """Return `count` inactive slots."""
    i32 = functools.partial(np.zeros, count, np.int32)
    return cls(
      token=i32(),
      position=i32(),
      prefix=np.full(count, -1, np.int32),
      active=np.zeros(count, bool),
      sampled=i32(),
      limit=i32(),
      key=np.zeros((count, 2), np.uint32),
      temperature=np.ones(count, np.float32),
      top_k=i32(),
      top_p=np.ones(count, np.float32),
      min_p=np.zeros(count, np.float32),
      stops=np.full((count, MAX_STOP_TOKENS), -1, np.int32),
    )

  def start(
    self,
    slot: int,
    token: int,
    position: int,
    key: np.ndarray,
    config: SamplingConfig,
    stop_token_ids: tuple[int, ...],
  ) -> None:
    """Prepare a slot, in place, to sample a reply. The caller sets it active.

    Args:
      slot: index of the slot.
      token: the context's last token.
      position: position of `token`.
      key: u32[2], random key of the turn.
      config: sampling settings.
      stop_token_ids: tokens that end the reply, MAX_STOP_TOKENS at most.
    """
    self.token[slot], self.position[slot] = token, position
    self.active[slot], self.sampled[slot], self.limit[slot] = False, 0, config.max_tokens
    self.key[slot], self.temperature[slot] = key, config.temperature
    self.top_k[slot], self.top_p[slot] = config.top_k, config.top_p
    self.min_p[slot] = config.min_p
    self.stops[slot] = -1
    self.stops[slot, : len(stop_token_ids)] = stop_token_ids

  def select(self, index: np.ndarray) -> 'Slots':
    """Return the state of some slots.

    Args:
      index: i32[B], the slots; -1 stands for an idle one.
    """
    rows = Slots(*(x[index] for x in self))
    return rows._replace(active=(index >= 0), prefix=np.where(index >= 0, rows.prefix, -1))


class ModelSpec(NamedTuple):
  """The static properties for which a model's programs are compiled.

  A spec is cheap to hash, unlike the whole graph of the model.
  """

  config: ModelConfig
  dtype: str
  mesh: Mesh

  @classmethod
  def from_lm(cls, lm: LM) -> 'ModelSpec':
    """Return the spec of a model in memory."""
    return cls(lm.config, lm.dtype, lm.mesh)


class Chunk(NamedTuple):
  """Tokens to prefill: T in each batch shard, those of several slots next to each other.

  Attributes:
    tokens: i32[G,T].
    positions: i32[G,T]; -1 marks padding.
    prefix: i32[G,T], index of the shared prefix that the token's slot starts with; -1 if none.
    pieces: how attention reads them.
  """

  tokens: np.ndarray
  positions: np.ndarray
  prefix: np.ndarray
  pieces: Pieces


class Burst(NamedTuple):
  """The result of a run of decode steps.

  Attributes:
    tokens: i32[B,U], sampled tokens.
    logprobs: f32[B,U], their log-probabilities in nats.
    num_sampled: i32[B], number of tokens that each row sampled.
    active: bool[B], whether the reply continues.
    steps: i32[], number of decode steps.
    row_steps: i32[B], number of steps in which each row was active.
  """

  tokens: np.ndarray
  logprobs: np.ndarray
  num_sampled: np.ndarray
  active: np.ndarray
  steps: np.ndarray
  row_steps: np.ndarray


class Sizes(NamedTuple):
  """The static sizes of a program that its arguments do not show.

  Attributes:
    burst: the largest number of tokens that a row samples before the burst ends.
    width: C, number of tokens of a piece of prefill.
    attention: name of the attention to the cache.
    drafts: W - 1, number of tokens that each row drafts in a step.
    least: number of tokens of each batch shard, if there are so many, for which the output layer
      computes logits, although fewer are decoded: then a row's bits do not depend on their number.
  """

  burst: int
  width: int
  attention: str = 'pages'
  drafts: int = 0
  least: int = 0


def run(
  spec: ModelSpec,
  params: Params,
  cache: Cache,
  prefix_caches: tuple[Prefix, ...],
  rows: Slots | None,
  tables: tuple[RowTable, ...],
  chunk: Chunk | None,
  limits: tuple[np.ndarray, np.ndarray],
  sizes: Sizes,
  penalties: Penalties | None = None,
  text: np.ndarray | None = None,
) -> tuple[Burst | jax.Array, Cache]:
  """Run one step with prefill, or a burst of steps without.

  Args:
    spec: the properties for which the model is compiled.
    params: the model's parameters.
    cache: the cache; donated.
    prefix_caches: all shared prefixes of the model.
    rows: the state of the rows; None only prefills.
    tables: the pages of the rows, for each window that layers have.
    chunk: the tokens to prefill; None decodes only.
    limits: two i32[]: stop once so many replies have ended, and once a row has sampled so many
      tokens.
    sizes: static sizes.
    penalties: biases and penalties of the rows; None compiles a program without any.
    text: i32[B,L], context and reply of each row, where entries beyond its position are undefined.
      Penalties and drafts need it.

  Returns:
    The sampled tokens, or without rows an array [] that is ready at the same time; and the updated
    cache.
  """
  program = _run_parts if runs_in_parts(spec.mesh) else step_program(cache)
  return program(
    spec, params, cache, prefix_caches, rows, tables, chunk, limits, sizes, penalties, text
  )


def step_program(cache: Cache) -> Callable:
  """Return `run` as one program, jitted, for a cache of arrays or ShapeDtypeStructs."""
  formats: Any = jax.tree.map(lambda x: x.format, cache[0][0])
  return _step_program(formats, tuple(map(len, cache)))


@functools.cache
def _step_program(layout: Any, counts: tuple[int, ...]) -> Callable:
  outputs = None, tuple((layout,) * count for count in counts)
  static = 'spec', 'sizes'
  return jax.jit(_run, static_argnames=static, donate_argnames='cache', out_shardings=outputs)


class _State(NamedTuple):
  """What a burst carries from step to step, besides the cache.

  Attributes:
    rows: the state of the rows.
    burst: the result so far.
    counts: the tokens of each row, for penalties; None without.
    text: context and reply of each row, for drafts and penalties; None without.
    unfinished: bool[], whether the burst goes on.
  """

  rows: Slots
  burst: Burst
  counts: jax.Array | None
  text: jax.Array | None
  unfinished: jax.Array


def _run(
  spec,
  params,
  cache,
  prefix_caches,
  rows,
  tables,
  chunk,
  limits,
  sizes,
  penalties=None,
  text=None,
  loop=jax.lax.while_loop,
):
  """Compute `run`, within `jax.jit` or with `loop=_loop` outside of it."""

  def forward(cache, batch):
    step = Step(tables, None if chunk is None else chunk.pieces)
    tokens, positions, choice = batch
    prefixes = Prefixes(prefix_caches, choice)
    layout = _forward_spec(spec, len(tokens), sizes)
    return forward_cached(layout, params, tokens, positions, cache, step, prefixes)

  if rows is None:
    cache = forward(cache, (chunk.tokens, chunk.positions, chunk.prefix))[1]
    return _read_entry(cache[-1][0]), cache
  rows = Slots(*rows)
  last = {name: value for name, value in params.items() if name != 'layers'}

  def step(carry):
    cache, state = carry
    draft, batch = _feed(spec, sizes, state, chunk)
    hidden, cache = forward(cache, batch)
    hidden = _decoded(sizes, hidden, draft)
    return cache, _take(spec, sizes, last, hidden, draft, state, penalties, rows.active, limits)

  carry = cache, _begin(spec, sizes, rows, limits, penalties, text)
  carry = loop(lambda carry: carry[1].unfinished, step, carry) if chunk is None else step(carry)
  return carry[1].burst, carry[0]


def _loop(condition, body, carry):
  """Compute `jax.lax.while_loop` outside of a program."""
  while condition(carry):
    carry = body(carry)
  return carry


_run_parts = functools.partial(_run, loop=_loop)


@jax.jit
def _read_entry(block):
  return block[0][0, 0, 0, 0]


@functools.partial(jax.jit, static_argnames=('spec', 'sizes'))
def _begin(spec, sizes, rows, limits, penalties, text):
  """Return the state before the first step."""
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
  unfinished = _is_unfinished(rows, burst, rows.active, limits)
  return _place(spec, _State(rows, burst, counts, text, unfinished))


def _is_unfinished(rows: Slots, burst: Burst, start, limits):
  """Return whether a burst goes on, whose rows were active at the start."""
  ended, longest = jnp.sum(start & ~rows.active), jnp.max(burst.num_sampled)
  return (longest < limits[1]) & (ended < limits[0]) & jnp.any(rows.active)


def _place(spec: ModelSpec, state: _State) -> _State:
  """Return the state on the mesh, where it is the output of a program of its own.

  Otherwise the next programs would be compiled twice: for the output of `_begin` and of `_take`.
  """
  if not runs_in_parts(spec.mesh):
    return state
  return jax.lax.with_sharding_constraint(state, NamedSharding(spec.mesh, P()))


@functools.partial(jax.jit, static_argnames=('spec', 'sizes'))
def _feed(spec, sizes, state, chunk):
  """Return the drafts i32[B,W-1], and tokens, positions and prefixes i32[G,D·W+T] of a step."""
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


def _forward_spec(spec: ModelSpec, groups: int, sizes: Sizes) -> ForwardSpec:
  # The prefill of a shared prefix has a single group, which every device computes as a whole.
  is_split = groups == batch_shards(spec.mesh)
  sharding = batch_sharding(spec.mesh) if is_split else NamedSharding(spec.mesh, P())
  return ForwardSpec(spec.config, spec.dtype, sharding, sizes.width, sizes.attention)


@functools.partial(jax.jit, static_argnames='sizes')
def _decoded(sizes, hidden, draft):
  """Return those of the hidden states [G,X,D] for which the output layer computes logits."""
  return hidden[:, : max(draft.shape[0] // len(hidden) * (draft.shape[1] + 1), sizes.least)]


@functools.partial(jax.jit, static_argnames=('spec', 'sizes'), donate_argnames='state')
def _take(spec, sizes, params, hidden, draft, state, penalties, start, limits):
  """Return the state after a step: with the tokens that it sampled and kept.

  Args:
    spec: the properties for which the model is compiled.
    sizes: static sizes.
    params: the model's parameters outside of its layers.
    hidden: [G,X,D], the hidden states of the decoded rows, and maybe of further tokens.
    draft: i32[B,W-1], the drafted tokens.
    state: the state before the step; donated.
    penalties: biases and penalties; None if there are none.
    start: bool[B], the rows that were active when the burst began.
    limits: those of `run`.
  """
  rows, burst, counts, text, _ = state
  b, width = len(rows.token), 1 + sizes.drafts
  groups = len(hidden)
  logits = compute_logits(spec.config, params, hidden.reshape(-1, hidden.shape[-1]))
  logits = logits.reshape(groups, -1, logits.shape[-1])[:, : b * width // groups]
  logits = logits.reshape(b * width, -1)
  token, logprob = _sample(logits, rows, draft, penalties, counts)
  # Tokens after one that ends the reply are dropped, as are those after a wrong draft.
  number = rows.sampled[:, None] + jnp.arange(1, width + 1)
  ends = jnp.any(token[:, :, None] == rows.stops[:, None], -1) | (number >= rows.limit[:, None])
  index = jnp.arange(width)
  last = jnp.min(jnp.where(ends, index, width), 1)
  kept = jnp.where(rows.active, jnp.minimum(count_kept(draft, token), last + 1), 0)
  taken = index < kept[:, None]
  if counts is not None:
    counts = add_tokens(counts, token, taken)

  def put(x, start, new):
    place = jnp.where(taken, start[:, None] + index, x.shape[1])
    return x.at[jnp.arange(b)[:, None], place].set(new, mode='drop')

  burst = Burst(
    tokens=put(burst.tokens, burst.num_sampled, token),
    logprobs=put(burst.logprobs, burst.num_sampled, logprob),
    num_sampled=burst.num_sampled + kept,
    active=rows.active & (kept <= last),
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
  unfinished = _is_unfinished(rows, burst, start, limits)
  return _place(spec, _State(rows, burst, counts, text, unfinished))


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


def prefill_prefix(lm: LM, tokens: list[int], capacity: int, size: int, width: int) -> Prefix:
  """Compute the keys and values of a shared prefix, replicated over batch shards.

  Args:
    lm: the model.
    tokens: token ids, at most `capacity`.
    capacity: number of tokens that the prefix's cache can hold.
    size: number of tokens per prefill chunk.
    width: number of tokens that attention processes together.

  Raises:
    UserError: if the mesh does not divide the number of key-value heads.
  """
  cache: Cache = tuple((layer,) for layer in allocate_prefix(lm, capacity))
  spec, zero = ModelSpec.from_lm(lm), np.zeros((), np.int32)
  for start in range(0, len(tokens), size):
    part = tokens[start : start + size]
    positions = np.full((1, size), -1, np.int32)
    positions[0, : len(part)] = np.arange(start, start + len(part))
    padded = np.zeros((1, size), np.int32)
    padded[0, : len(part)] = part
    pieces = np.arange(0, size, width, dtype=np.int32)[None]
    count = -(-len(part) // width)
    table = PieceTable(
      page=np.where(positions < 0, 1, 0),  # type: ignore[arg-type]  # numpy arrays
      offset=np.maximum(positions, 0),  # type: ignore[arg-type]
      pages=np.zeros((*pieces.shape, 1), np.int32),  # type: ignore[arg-type]
      num_pages=np.ones(pieces.shape, np.int32),  # type: ignore[arg-type]
      first=np.zeros(pieces.shape, np.int32),  # type: ignore[arg-type]
    )
    tables = (table,) * len(windows_of(lm.config))
    number = np.array([count], np.int32)
    split = Pieces(pieces, number, tables)  # type: ignore[arg-type]
    chunk = Chunk(padded, positions, np.full_like(positions, -1), split)
    cache = run(spec, lm.params, cache, (), None, (), chunk, (zero, zero), Sizes(1, width))[1]
  return Prefix(tuple(layer for (layer,) in cache), jnp.array(len(tokens), jnp.int32))
