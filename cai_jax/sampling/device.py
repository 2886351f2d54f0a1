"""The compiled step, its inputs and its outputs.

A step is one pass of the model over a flat batch of tokens: the next token of each decoded row, and
prefilled tokens of rows that wait. A row is a slot that takes part; there are programs for a few
numbers of rows, so that idle slots cost little. A program without prefill runs a burst of steps.

Axes: B rows, U steps of a burst; G batch shards, D rows of a shard (B = G · D) and T prefilled
tokens of a shard.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
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
from cai_jax.model.config import ModelConfig
from cai_jax.model.lm import LM
from cai_jax.model.transformer import Params, Transformer, abstract_model
from cai_jax.runtime.mesh import batch_sharding, batch_shards
from cai_jax.sampling.caches import allocate_prefix
from cai_jax.sampling.noise import token_keys
from cai_jax.sampling.penalties import Penalties, count_token, count_tokens, penalize
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

  def build(self, params: Params) -> Transformer:
    """Return the model with its parameters. Call this inside a jitted function."""
    return nnx.merge(abstract_model(self.config, self.dtype)[0], params)


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
    occupied: i32[], number of active rows, summed over steps.
  """

  tokens: np.ndarray
  logprobs: np.ndarray
  num_sampled: np.ndarray
  active: np.ndarray
  steps: np.ndarray
  occupied: np.ndarray


class Sizes(NamedTuple):
  """The static sizes of a program that its arguments do not show.

  Attributes:
    burst: U, the largest number of steps.
    width: C, number of tokens of a piece of prefill.
    attention: name of the attention to the cache.
  """

  burst: int
  width: int
  attention: str = 'pages'


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
    limits: two i32[]: stop once so many replies have ended, and after so many steps.
    sizes: static sizes.
    penalties: biases and penalties of the rows; None compiles a program without any.

  Returns:
    The sampled tokens, or without rows an array i32[] that is ready at the same time; and the
    updated cache.
  """
  program = step_program(cache)
  return program(spec, params, cache, prefix_caches, rows, tables, chunk, limits, sizes, penalties)


def step_program(cache: Cache) -> Callable:
  """Return the jitted `run` for a cache of arrays or ShapeDtypeStructs."""
  formats: Any = jax.tree.map(lambda x: x.format, cache[0][0])
  return _step_program(formats, tuple(map(len, cache)))


@functools.cache
def _step_program(layout: Any, counts: tuple[int, ...]) -> Callable:
  outputs = None, tuple((layout,) * count for count in counts)
  static = 'spec', 'sizes'
  return jax.jit(_run, static_argnames=static, donate_argnames='cache', out_shardings=outputs)


def _run(spec, params, cache, prefix_caches, rows, tables, chunk, limits, sizes, penalties=None):
  model = spec.build(params)
  if rows is None:
    cache = _forward(spec, model, cache, prefix_caches, None, tables, chunk, sizes)[1]
    return jnp.sum(chunk.positions >= 0, dtype=jnp.int32), cache
  rows = Slots(*rows)
  b = len(rows.token)
  start, counts = rows.active, None
  if penalties is not None:
    counts = count_tokens(penalties, rows.position, rows.sampled, spec.config.vocab_size)

  def unfinished(state):
    _, rows, burst, _ = state
    ended = jnp.sum(start & ~rows.active)
    return (burst.steps < limits[1]) & (ended < limits[0]) & jnp.any(rows.active)

  def step(state):
    cache, rows, burst, counts = state
    active = rows.active
    hidden, cache = _forward(spec, model, cache, prefix_caches, rows, tables, chunk, sizes)
    logits = model.unembed(hidden)
    keys = token_keys(rows.key, rows.sampled)
    adjusted = None if penalties is None else penalize(logits, penalties, counts)
    settings = rows.temperature, rows.top_k, rows.top_p, rows.min_p
    token, logprob = sample(logits, keys, *settings, adjusted)
    counts = None if penalties is None else count_token(counts, token, active)
    sampled = rows.sampled + active
    ended = jnp.any(token[:, None] == rows.stops, -1) | (sampled >= rows.limit)
    burst = Burst(
      tokens=burst.tokens.at[:, burst.steps].set(token),
      logprobs=burst.logprobs.at[:, burst.steps].set(logprob),
      num_sampled=burst.num_sampled + active,
      active=active & ~ended,
      steps=burst.steps + 1,
      occupied=burst.occupied + jnp.sum(active),
    )
    rows = rows._replace(
      token=jnp.where(active, token, rows.token),
      position=rows.position + active,
      sampled=sampled,
      active=burst.active,
    )
    return cache, rows, burst, counts

  zero = jnp.zeros((), jnp.int32)
  capacity = sizes.burst if chunk is None else 1
  burst = Burst(
    tokens=jnp.zeros((b, capacity), jnp.int32),
    logprobs=jnp.zeros((b, capacity), jnp.float32),
    num_sampled=jnp.zeros((b,), jnp.int32),
    active=start,
    steps=zero,
    occupied=zero,
  )
  state = cache, rows, burst, counts
  state = step(state) if chunk is not None else jax.lax.while_loop(unfinished, step, state)
  return state[2], state[0]


def _forward(spec, model, cache, prefix_caches, rows, tables, chunk, sizes):
  """Return the hidden states [B,D] of the rows, and the updated cache."""
  shards = batch_shards(spec.mesh)
  groups = shards if rows is not None else len(chunk.tokens)
  tokens, positions, choice = [], [], []
  if rows is not None:
    split = lambda x: x.reshape(groups, -1)  # noqa: E731
    tokens.append(split(rows.token))
    positions.append(split(jnp.where(rows.active, rows.position, -1)))
    choice.append(split(rows.prefix))
  if chunk is not None:
    tokens.append(chunk.tokens)
    positions.append(chunk.positions)
    choice.append(chunk.prefix)
  tokens, positions, choice = (jnp.concatenate(x, 1) for x in (tokens, positions, choice))
  # The prefill of a shared prefix has a single group, which every device computes as a whole.
  split = groups == shards
  sharding = batch_sharding(spec.mesh) if split else NamedSharding(spec.mesh, P())
  hidden, cache = model(
    tokens,
    positions,
    cache=cache,
    step=Step(tables, None if chunk is None else chunk.pieces),
    prefixes=Prefixes(prefix_caches, choice),
    width=sizes.width,
    sharding=sharding,
    attention=sizes.attention,
  )
  if rows is None:
    return None, cache
  hidden = hidden[:, : len(rows.token) // groups]
  return hidden.reshape(len(rows.token), -1), cache


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
  cache = tuple((layer,) for layer in allocate_prefix(lm, capacity))
  spec, zero = ModelSpec.from_lm(lm), np.zeros((), np.int32)
  for start in range(0, len(tokens), size):
    part = tokens[start : start + size]
    positions = np.full((1, size), -1, np.int32)
    positions[0, : len(part)] = np.arange(start, start + len(part))
    padded = np.zeros((1, size), np.int32)
    padded[0, : len(part)] = part
    pieces = np.arange(0, size, width, np.int32)[None]
    count = -(-len(part) // width)
    table = PieceTable(
      page=np.where(positions < 0, 1, 0),  # type: ignore[arg-type]  # numpy arrays
      offset=np.maximum(positions, 0),  # type: ignore[arg-type]
      pages=np.zeros((*pieces.shape, 1), np.int32),  # type: ignore[arg-type]
      count=np.ones(pieces.shape, np.int32),  # type: ignore[arg-type]
      first=np.zeros(pieces.shape, np.int32),  # type: ignore[arg-type]
    )
    tables = (table,) * len(windows_of(lm.config))
    chunk = Chunk(
      padded,
      positions,
      np.full_like(positions, -1),
      Pieces(pieces, np.array([count], np.int32), tables),
    )  # type: ignore[arg-type]
    cache = run(spec, lm.params, cache, (), None, (), chunk, (zero, zero), Sizes(1, width))[1]
  return Prefix(tuple(layer for (layer,) in cache), jnp.array(len(tokens), jnp.int32))
