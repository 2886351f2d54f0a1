"""What a step takes and returns, and what its programs are compiled for.

Axes, here and in `cai_jax.sampling.burst` and `cai_jax.sampling.device`: B rows, W tokens of a row
in a step, U tokens of a row in a burst; G batch shards, D rows of a shard (B = G · D) and T
prefilled tokens of a shard.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from cai_jax.model.cache import Pieces
from cai_jax.model.config import ModelConfig
from cai_jax.model.lm import LM
from cai_jax.sampling.caches import on_cpu
from cai_jax.sampling.types import MAX_STOP_TOKENS, SamplingConfig

Array = Any  # a NumPy array on the host, a JAX array in programs


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

  token: Array
  position: Array
  prefix: Array
  active: Array
  sampled: Array
  limit: Array
  key: Array
  temperature: Array
  top_k: Array
  top_p: Array
  min_p: Array
  stops: Array

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

  tokens: Array
  positions: Array
  prefix: Array
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

  tokens: Array
  logprobs: Array
  num_sampled: Array
  active: Array
  steps: Array
  row_steps: Array


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


def runs_in_parts(mesh: Mesh) -> bool:
  """Return whether a step runs as several programs instead of one.

  Each program takes the host about 0.1 ms to start. A single program compiles for as long as all
  layers together.
  """
  return mesh.size == 1 and on_cpu(mesh)
