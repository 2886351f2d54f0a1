"""The compiled half of sampling: prefill and decode over a cache of B slots."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cai_jax.model.cache import (
  Cache,
  LayerCache,
  Lengths,
  Packing,
  Prefix,
  Prefixes,
  cache_lengths,
  init_cache,
)
from cai_jax.model.config import ModelConfig
from cai_jax.model.lm import LM
from cai_jax.model.transformer import Transformer, abstract_model
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import BATCH, batch_sharding, batch_shards, check_batch
from cai_jax.sampling.sample import sample, uniforms
from cai_jax.sampling.types import MAX_STOP_TOKENS, SamplingConfig

# On TPUs a step writes a token's keys of all heads, and memory is laid out for that, as [B,S,K,H].
# A cache given or taken in another layout would be copied whole, at each call, there and back.
TPU_LAYOUT = LayerCache(Layout((0, 3, 1, 2)), Layout((0, 2, 1, 3)))


class Slots(NamedTuple):
  """What the decode program needs to know of each slot, kept on the host; B rows."""

  token: np.ndarray  # i32[B], the last token of the context, not yet in the cache
  position: np.ndarray  # i32[B], its position
  prefix: np.ndarray  # i32[B], the shared prefix that the context begins with; -1 is none
  active: np.ndarray  # bool[B], whether a reply is being sampled
  sampled: np.ndarray  # i32[B], tokens of the reply so far
  limit: np.ndarray  # i32[B], the most it may have
  key: np.ndarray  # u32[B,2], the turn's random key
  temperature: np.ndarray  # f32[B]
  top_k: np.ndarray  # i32[B]
  top_p: np.ndarray  # f32[B]
  stops: np.ndarray  # i32[B,MAX_STOP_TOKENS], tokens that end the reply; -1 is none

  @classmethod
  def empty(cls, count: int) -> 'Slots':
    """`count` slots, none of them active."""
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
    """Sets a slot up to sample a reply after `token` at `position`, once it is made active."""
    self.token[slot], self.position[slot] = token, position
    self.active[slot], self.sampled[slot], self.limit[slot] = False, 0, config.max_tokens
    self.key[slot], self.temperature[slot] = key, config.temperature
    self.top_k[slot], self.top_p[slot] = config.top_k, config.top_p
    self.stops[slot] = -1
    self.stops[slot, : len(stop_token_ids)] = stop_token_ids


class Kind(NamedTuple):
  """What a model's programs are compiled for. Quickly hashed, unlike a model's whole graph."""

  config: ModelConfig
  dtype: str
  mesh: Mesh

  @classmethod
  def of(cls, lm: LM) -> 'Kind':
    """The kind of a model in memory."""
    return cls(lm.config, lm.dtype, lm.mesh)

  def model(self, params) -> Transformer:
    """The model with its parameters, inside a jitted function."""
    return nnx.merge(abstract_model(self.config, self.dtype)[0], params)


class Part(NamedTuple):
  """Tokens that a slot's cache is to hold next."""

  slot: int
  tokens: list[int]
  start: int  # position of the first
  prefix: int  # the shared prefix that the slot begins with; -1 is none


class Chunk(NamedTuple):
  """Tokens to prefill: T for each of B equal groups of slots, those of several side by side."""

  tokens: np.ndarray  # i32[B,T]
  positions: np.ndarray  # i32[B,T]; -1 is padding
  prefix: np.ndarray  # i32[B,T], the shared prefix that the token's slot begins with; -1 is none
  packing: Packing

  @classmethod
  def pack(cls, groups: Sequence[Sequence[Part]], slots: int, size: int, width: int) -> 'Chunk':
    """A chunk of the tokens of each group.

    Args:
      groups: what slots of each group shall hold, in order; a slot occurs once.
      slots: in all.
      size: tokens of a group, T.
      width: tokens of a slot that attention takes together, C.

    Raises:
      ValueError: if a group has more than `size` tokens or `piece_count(size, width)` pieces.
    """
    count, shape = piece_count(size, width), (len(groups), size)
    tokens, rows, place = (np.zeros(shape, np.int32) for _ in range(3))
    positions, prefix = (np.full(shape, -1, np.int32) for _ in range(2))
    index = np.full((len(groups), count * width), size, np.int32)
    for group, parts in enumerate(groups):
      end = piece = 0
      for part in parts:
        begin, end = end, end + len(part.tokens)
        offsets = np.arange(end - begin)
        here, there = (group, slice(begin, end)), piece * width + offsets
        piece += -(-len(offsets) // width)
        if end > size or piece > count:
          raise UserError(f'a chunk of {end} tokens in {piece} pieces; {size} in {count} fit.')
        tokens[here], positions[here] = part.tokens, part.start + offsets
        rows[here], prefix[here] = part.slot % (slots // len(groups)), part.prefix
        place[here], index[group, there] = there, begin + offsets
    packing = Packing(rows, index.reshape(len(groups), count, width), place)
    return cls(tokens, positions, prefix, packing)


def piece_count(size: int, width: int) -> int:
  """Pieces of `width` tokens that attention takes of `size`: half as many more than full ones."""
  return 1 if width >= size else -(-3 * size // (2 * width))


class Burst(NamedTuple):
  """What a run of decode steps gave; U is the longest burst."""

  tokens: np.ndarray  # i32[B,U]
  logprobs: np.ndarray  # f32[B,U]
  count: np.ndarray  # i32[B], how many of the U are there
  active: np.ndarray  # bool[B], whether the reply goes on
  steps: np.ndarray  # i32[], decode steps run
  occupied: np.ndarray  # i32[], slots active, summed over steps


def prefill(
  kind: Kind, params, cache: Cache, entries: tuple[Prefix, ...], chunk: Chunk
) -> tuple[Cache, jax.Array]:
  """The cache with the tokens of a chunk written to its rows; `entries` are all prefixes.

  The array i32[] beside it is there when the cache is, and may be waited for when that has already
  been donated to the next program.
  """
  return prefill_program(cache)(kind, params, cache, entries, chunk)


def prefill_program(cache: Cache):
  """`prefill` as it is compiled for such a cache, of arrays or ShapeDtypeStructs."""
  return _prefill_program(*_form(cache))


@functools.cache
def _prefill_program(form, counts):
  outputs = tuple((form,) * count for count in counts), None
  return jax.jit(_prefill, static_argnames='kind', donate_argnames='cache', out_shardings=outputs)


def _form(cache: Cache) -> tuple[LayerCache, tuple[int, ...]]:
  """Sharding and layout of all arrays, which are those of the first; spans of each layer."""
  return LayerCache(*(x.format for x in cache[0][0])), tuple(map(len, cache))


def _prefill(kind, params, cache, entries, chunk):
  # A prefix is one group, of which every device computes all.
  split = len(chunk.tokens) == batch_shards(kind.mesh)
  sharding = batch_sharding(kind.mesh) if split else NamedSharding(kind.mesh, P())
  written = kind.model(params)(
    chunk.tokens,
    chunk.positions,
    cache=cache,
    packing=chunk.packing,
    prefixes=Prefixes(entries, chunk.prefix),
    sharding=sharding,
  )[1]
  return written, jnp.sum(chunk.positions >= 0, dtype=jnp.int32)


def decode(
  kind: Kind,
  params,
  cache: Cache,
  entries: tuple[Prefix, ...],
  slots: Slots,
  enough,
  longest,
  width: int,
) -> tuple[Burst, Cache]:
  """Samples in every active slot until `enough` i32[] are done or `longest` i32[] steps are run.

  `width` is U, the most that `longest` may be.
  """
  program = decode_program(cache)
  return program(kind, params, cache, entries, slots, enough, longest, width)


def decode_program(cache: Cache):
  """`decode` as it is compiled for such a cache, of arrays or ShapeDtypeStructs."""
  return _decode_program(*_form(cache))


@functools.cache
def _decode_program(form, counts):
  static, outputs = ('kind', 'width'), (None, tuple((form,) * count for count in counts))
  return jax.jit(_decode, static_argnames=static, donate_argnames='cache', out_shardings=outputs)


def _decode(kind, params, cache, entries, slots, enough, longest, width):
  model = kind.model(params)
  sharding = batch_sharding(kind.mesh)
  prefixes = Prefixes(entries, slots.prefix)
  b = slots.token.shape[0]
  start = slots.active

  def unfinished(state):
    _, slots, burst = state
    done = jnp.sum(start & ~slots.active)
    return (burst.steps < longest) & (done < enough) & jnp.any(slots.active)

  def step(state):
    cache, slots, burst = state
    active = slots.active
    positions = jnp.where(active, slots.position, -1)[:, None]
    hidden, cache = model(
      slots.token[:, None], positions, cache=cache, prefixes=prefixes, sharding=sharding
    )
    logits = model.unembed(hidden[:, 0])
    u = uniforms(slots.key, slots.sampled)
    token, logprob = sample(logits, u, slots.temperature, slots.top_k, slots.top_p)
    sampled = slots.sampled + active
    ended = jnp.any(token[:, None] == slots.stops, -1) | (sampled >= slots.limit)
    burst = Burst(
      tokens=burst.tokens.at[:, burst.steps].set(token),
      logprobs=burst.logprobs.at[:, burst.steps].set(logprob),
      count=burst.count + active,
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
    return cache, slots, burst

  zero = jnp.zeros((), jnp.int32)
  burst = Burst(
    tokens=jnp.zeros((b, width), jnp.int32),
    logprobs=jnp.zeros((b, width), jnp.float32),
    count=jnp.zeros((b,), jnp.int32),
    active=start,
    steps=zero,
    occupied=zero,
  )
  cache, _, burst = jax.lax.while_loop(unfinished, step, (cache, Slots(*slots), burst))
  return burst, cache


def cache_bytes(lm: LM, length: int, slack: int) -> int:
  """Bytes of one slot's cache, over all devices."""
  tokens = sum(map(sum, cache_lengths(lm.config, length, slack)))
  return tokens * 2 * lm.config.num_kv_heads * lm.config.head_dim * cache_dtype(lm).itemsize


def cache_dtype(lm: LM) -> jnp.dtype:
  """The model's compute dtype; f32 on CPUs, where XLA rewrites a half-precision cache each step."""
  return jnp.dtype('float32' if on_cpu(lm.mesh) else lm.dtype)


def on_cpu(mesh: Mesh) -> bool:
  """Whether a mesh is one of CPUs."""
  return mesh.devices.flat[0].platform == 'cpu'


def cache_format(mesh: Mesh, spec: P) -> LayerCache:
  """Sharding of a layer's cache, and on TPUs its layout."""
  sharding = NamedSharding(mesh, spec)
  if mesh.devices.flat[0].platform != 'tpu':
    return LayerCache(sharding, sharding)
  return LayerCache(*(Format(layout, sharding) for layout in TPU_LAYOUT))


def allocate(lm: LM, slots: int, lengths: Lengths) -> Cache:
  """An empty cache of `slots` rows on the model's mesh.

  Rows are split over the mesh's batch axes and heads over `tensor`.

  Args:
    lm: the model.
    slots: rows.
    lengths: tokens of each layer's spans.

  Raises:
    ValueError: if the mesh does not divide the slots, or the kv heads.
  """
  check_rows(lm, slots)
  return _empty(lm, slots, lengths, P(*BATCH, 'tensor'))


def check_rows(lm: LM, rows: int) -> None:
  """ValueError unless the model's mesh divides the rows of a cache, and its kv heads."""
  check_batch(rows, lm.mesh, 'engine.slots')
  _check_heads(lm)


def _check_heads(lm: LM) -> None:
  kv_heads, tensor = lm.config.num_kv_heads, lm.mesh.shape['tensor']
  if kv_heads % tensor:
    raise UserError(f'mesh axis tensor={tensor} does not divide the {kv_heads} kv heads.')


def prefill_prefix(lm: LM, tokens: list[int], length: int, size: int, width: int) -> Prefix:
  """A shared prefix with its keys and values, in a cache of `length` tokens on every batch shard.

  Args:
    lm: the model.
    tokens: of the prefix; at most `length`.
    length: of the cache.
    size: tokens prefilled together.
    width: of them, tokens that attention takes together.

  Raises:
    ValueError: if the mesh does not divide the kv heads.
  """
  cache = _empty(lm, 1, ((length,),) * lm.config.num_layers, P(None, 'tensor'))
  for start in range(0, len(tokens), size):
    part = Part(0, tokens[start : start + size], start, -1)
    cache, _ = prefill(Kind.of(lm), lm.params, cache, (), Chunk.pack([[part]], 1, size, width))
  return Prefix(cache, jnp.array(len(tokens), jnp.int32))


def _empty(lm: LM, rows: int, lengths: Lengths, spec: P) -> Cache:
  _check_heads(lm)
  return _empty_program(lm.config, rows, lengths, cache_dtype(lm), cache_format(lm.mesh, spec))()


@functools.cache
def _empty_program(config: ModelConfig, rows: int, lengths: Lengths, dtype, form):
  init = functools.partial(init_cache, config, rows, lengths, dtype)
  return jax.jit(init, out_shardings=tuple((form,) * len(layer) for layer in lengths))
