"""The compiled prefill and decode programs, and their inputs and outputs.

Axes: B slots (rows of the cache), U steps of a burst. In a prefill chunk, as in
`cai_jax.model.cache.Packing`, B counts groups of slots, T the tokens of a group, and C the tokens
of an attention piece.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cai_jax.model.cache import Cache, LayerCache, Packing, Prefix, Prefixes
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
  """The state of all slots, which the decode program reads; it is kept on the host.

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


class Segment(NamedTuple):
  """Consecutive tokens to append to one slot's cache.

  Attributes:
    slot: index of the slot.
    tokens: token ids.
    start: position of the first token.
    prefix: index of the shared prefix that the slot's context starts with; -1 if none.
  """

  slot: int
  tokens: list[int]
  start: int
  prefix: int


class Chunk(NamedTuple):
  """The tokens to prefill in one call: T for each of B equal groups of slots.

  The tokens of several slots are packed next to each other, without padding between them.

  Attributes:
    tokens: i32[B,T].
    positions: i32[B,T]; -1 marks padding.
    prefix: i32[B,T], index of the shared prefix that the token's slot starts with; -1 if none.
    packing: the slots that the tokens belong to.
  """

  tokens: np.ndarray
  positions: np.ndarray
  prefix: np.ndarray
  packing: Packing

  @classmethod
  def pack(cls, groups: Sequence[Sequence[Segment]], slots: int, size: int, width: int) -> 'Chunk':
    """Pack the segments of each group of slots into a chunk.

    Args:
      groups: the segments of each group in order, at most one per slot.
      slots: number of slots in all groups.
      size: T, maximum number of tokens of a group.
      width: C, number of tokens of one slot that attention processes together.

    Raises:
      ValueError: if a group has more than `size` tokens or `piece_count(size, width)` pieces.
    """
    max_pieces, shape = piece_count(size, width), (len(groups), size)
    tokens, rows, piece_index = (np.zeros(shape, np.int32) for _ in range(3))
    positions, prefix = (np.full(shape, -1, np.int32) for _ in range(2))
    places = np.full((len(groups), max_pieces * width), size, np.int32)
    for group, segments in enumerate(groups):
      end = piece = 0
      for segment in segments:
        begin, end = end, end + len(segment.tokens)
        offsets = np.arange(end - begin)
        target, padded = (group, slice(begin, end)), piece * width + offsets
        piece += -(-len(offsets) // width)
        if end > size or piece > max_pieces:
          raise ValueError(
            f'a chunk has room for {size} tokens in {max_pieces} pieces; it got at least {end} '
            f'tokens in {piece} pieces.'
          )
        tokens[target], positions[target] = segment.tokens, segment.start + offsets
        rows[target], prefix[target] = segment.slot % (slots // len(groups)), segment.prefix
        piece_index[target], places[group, padded] = padded, begin + offsets
    token_index = places.reshape(len(groups), max_pieces, width)
    packing = Packing(rows, token_index, piece_index)  # type: ignore[arg-type]  # numpy arrays
    return cls(tokens, positions, prefix, packing)


def piece_count(size: int, width: int) -> int:
  """Return the number of attention pieces of `width` tokens in a chunk of `size` tokens.

  It is 1.5 times the number of full pieces, because the last piece of a slot is rarely full.

  Args:
    size: T, number of tokens of a chunk.
    width: C, number of tokens of a piece.
  """
  return 1 if width >= size else -(-3 * size // (2 * width))


class Burst(NamedTuple):
  """The result of a run of decode steps.

  Attributes:
    tokens: i32[B,U], sampled tokens.
    logprobs: f32[B,U], their log-probabilities in nats.
    num_sampled: i32[B], number of tokens that each slot sampled.
    active: bool[B], whether the reply continues.
    steps: i32[], number of decode steps.
    occupied: i32[], number of active slots, summed over steps.
  """

  tokens: np.ndarray
  logprobs: np.ndarray
  num_sampled: np.ndarray
  active: np.ndarray
  steps: np.ndarray
  occupied: np.ndarray


def prefill(
  spec: ModelSpec,
  params: Params,
  cache: Cache,
  prefix_caches: tuple[Prefix, ...],
  chunk: Chunk,
) -> tuple[Cache, jax.Array]:
  """Write the keys and values of a chunk to the cache.

  Args:
    spec: the properties for which the model is compiled.
    params: the model's parameters.
    cache: the cache of all slots; donated.
    prefix_caches: all shared prefixes of the model.
    chunk: the tokens.

  Returns:
    The updated cache, and an array i32[] that is ready at the same time. The host can wait for this
    array even after it has donated the cache to another program.
  """
  return prefill_program(cache)(spec, params, cache, prefix_caches, chunk)


def prefill_program(cache: Cache) -> Callable:
  """Return the jitted `prefill` for a cache of arrays or ShapeDtypeStructs."""
  return _prefill_program(*_cache_format(cache))


@functools.cache
def _prefill_program(layout: LayerCache, counts: tuple[int, ...]) -> Callable:
  outputs = tuple((layout,) * count for count in counts), None
  return jax.jit(_prefill, static_argnames='spec', donate_argnames='cache', out_shardings=outputs)


def _cache_format(cache: Cache) -> tuple[LayerCache, tuple[int, ...]]:
  """Return the format of the first span, which all spans share, and each layer's span count."""
  formats: tuple[Any, ...] = tuple(x.format for x in cache[0][0])  # type: ignore[attr-defined]
  return LayerCache(*formats), tuple(map(len, cache))


def _prefill(spec, params, cache, prefix_caches, chunk):
  # The prefill of a shared prefix has a single group, which every device computes as a whole.
  split = len(chunk.tokens) == batch_shards(spec.mesh)
  sharding = batch_sharding(spec.mesh) if split else NamedSharding(spec.mesh, P())
  written = spec.build(params)(
    chunk.tokens,
    chunk.positions,
    cache=cache,
    packing=chunk.packing,
    prefixes=Prefixes(prefix_caches, chunk.prefix),
    sharding=sharding,
  )[1]
  return written, jnp.sum(chunk.positions >= 0, dtype=jnp.int32)


def decode(
  spec: ModelSpec,
  params: Params,
  cache: Cache,
  prefix_caches: tuple[Prefix, ...],
  slots: Slots,
  max_ended: np.ndarray,
  max_steps: np.ndarray,
  capacity: int,
  penalties: Penalties | None = None,
) -> tuple[Burst, Cache]:
  """Run decode steps in all active slots.

  Args:
    spec: the properties for which the model is compiled.
    params: the model's parameters.
    cache: the cache of all slots; donated.
    prefix_caches: all shared prefixes of the model.
    slots: the state of all slots.
    max_ended: i32[]; stop once this many replies have ended.
    max_steps: i32[]; stop after this many steps.
    capacity: U, the largest value of `max_steps`; static.
    penalties: biases and penalties of the slots; None compiles a program without any.

  Returns:
    The sampled tokens and the updated cache.
  """
  program = decode_program(cache)
  state = slots, max_ended, max_steps
  return program(spec, params, cache, prefix_caches, *state, capacity, penalties)


def decode_program(cache: Cache) -> Callable:
  """Return the jitted `decode` for a cache of arrays or ShapeDtypeStructs."""
  return _decode_program(*_cache_format(cache))


@functools.cache
def _decode_program(layout: LayerCache, counts: tuple[int, ...]) -> Callable:
  static, outputs = ('spec', 'capacity'), (None, tuple((layout,) * count for count in counts))
  return jax.jit(_decode, static_argnames=static, donate_argnames='cache', out_shardings=outputs)


def _decode(
  spec, params, cache, prefix_caches, slots, max_ended, max_steps, capacity, penalties=None
):
  model = spec.build(params)
  sharding = batch_sharding(spec.mesh)
  prefixes = Prefixes(prefix_caches, slots.prefix)
  b = slots.token.shape[0]
  start, counts = slots.active, None
  if penalties is not None:
    counts = count_tokens(penalties, slots.position, slots.sampled, spec.config.vocab_size)

  def unfinished(state):
    _, slots, burst, _ = state
    ended = jnp.sum(start & ~slots.active)
    return (burst.steps < max_steps) & (ended < max_ended) & jnp.any(slots.active)

  def step(state):
    cache, slots, burst, counts = state
    active = slots.active
    positions = jnp.where(active, slots.position, -1)[:, None]
    hidden, cache = model(
      slots.token[:, None], positions, cache=cache, prefixes=prefixes, sharding=sharding
    )
    logits = model.unembed(hidden[:, 0])
    keys = token_keys(slots.key, slots.sampled)
    adjusted = None if penalties is None else penalize(logits, penalties, counts)
    settings = slots.temperature, slots.top_k, slots.top_p, slots.min_p
    token, logprob = sample(logits, keys, *settings, adjusted)
    counts = None if penalties is None else count_token(counts, token, active)
    sampled = slots.sampled + active
    ended = jnp.any(token[:, None] == slots.stops, -1) | (sampled >= slots.limit)
    burst = Burst(
      tokens=burst.tokens.at[:, burst.steps].set(token),
      logprobs=burst.logprobs.at[:, burst.steps].set(logprob),
      num_sampled=burst.num_sampled + active,
      active=active & ~ended,
      steps=burst.steps + 1,
      occupied=burst.occupied + jnp.sum(active),
    )
    slots = slots._replace(
      token=jnp.where(active, token, slots.token),
      position=slots.position + active,
      sampled=sampled,
      active=burst.active,
    )
    return cache, slots, burst, counts

  zero = jnp.zeros((), jnp.int32)
  burst = Burst(
    tokens=jnp.zeros((b, capacity), jnp.int32),
    logprobs=jnp.zeros((b, capacity), jnp.float32),
    num_sampled=jnp.zeros((b,), jnp.int32),
    active=start,
    steps=zero,
    occupied=zero,
  )
  state = cache, Slots(*slots), burst, counts
  cache, _, burst, _ = jax.lax.while_loop(unfinished, step, state)
  return burst, cache


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
  cache = allocate_prefix(lm, capacity)
  spec = ModelSpec.from_lm(lm)
  for start in range(0, len(tokens), size):
    segment = Segment(0, tokens[start : start + size], start, -1)
    cache, _ = prefill(spec, lm.params, cache, (), Chunk.pack([[segment]], 1, size, width))
  return Prefix(cache, jnp.array(len(tokens), jnp.int32))
