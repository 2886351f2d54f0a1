"""The forward of a step over the paged cache.

It has three parts: the embeddings, with what all layers share; a layer; and the logits. Within
`jax.jit` they become parts of one program. Outside, each part is a program of its own, and layers
of one kind (`config.LayerKind`) share one if they rotate as many channels. A model of 30 layers
then compiles in a fraction of the time.

`cai_jax.model.transformer` and `cai_jax.model.cache` define the axis letters.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from cai_jax.model import delta_cache
from cai_jax.model.attention import paged, ragged, triton  # noqa: F401  # they register themselves
from cai_jax.model.attention.cached import CACHED
from cai_jax.model.attention.rotary import (
  Angles,
  growth_of,
  rotary_angles,
  rotation_of,
  rotations_of,
)
from cai_jax.model.attention.scores import scores_of
from cai_jax.model.cache import Cache, Prefixes, Step, windows_of
from cai_jax.model.config import LayerKind, ModelConfig
from cai_jax.model.layers import Block, LayerContext, embed_tokens
from cai_jax.model.logits import logit_transform_of
from cai_jax.model.parts import Embedding, Norm, make_norm
from cai_jax.model.transformer import Params, compute_once, unembed

# For each layer of experts, i32[G,E]: how many tokens of a batch shard each expert has computed.
Usage = tuple[jax.Array, ...]


class ForwardSpec(NamedTuple):
  """What the parts are compiled for, besides the shapes of arrays.

  Attributes:
    config: the shape of the model.
    dtype: compute dtype.
    sharding: sharding of the hidden states between layers. Without one, XLA would split them over D
      as it splits the parameters, and each device would compute the logits of all rows.
    width: C, number of tokens of a piece of prefill.
    attention: name of the attention to the cache.
  """

  config: ModelConfig
  dtype: str
  sharding: NamedSharding
  width: int = 1
  attention: str = 'pages'


def forward_cached(
  spec: ForwardSpec,
  params: Params,
  tokens: jax.Array,
  positions: jax.Array,
  cache: Cache,
  step: Step,
  prefixes: Prefixes | None = None,
  usage: Usage = (),
) -> tuple[jax.Array, Cache, Usage]:
  """Return the hidden states [G,X,D] before the last norm, and the updated cache and usage.

  Args:
    spec: what to compile for.
    params: the model's parameters.
    tokens: i32[G,X], the flat batch of a step in each of G batch shards.
    positions: i32[G,X], from 0 in each sequence. A negative position marks padding, which is not
      written to the cache.
    cache: keys and values of the tokens at earlier positions, with room for `tokens`; donated,
      outside `jax.jit`.
    step: where the tokens are in the cache.
    prefixes: shared tokens before those in the cache of each row. Positions include them.
    usage: how often experts were used so far; () does not count it.
  """
  if prefixes is None:
    prefixes = Prefixes((), jnp.full(positions.shape, -1))
  config, windows, rotations = spec.config, windows_of(spec.config), rotations_of(spec.config)
  axis = CACHED[spec.attention].page_axis
  attention = [blocks for kind, blocks in zip(config.kinds, cache, strict=True) if not kind.delta]
  page = attention[0][0][0].shape[axis] if attention else 0
  sizes = {  # pages of each block, for each window
    config.window(layer): tuple(len(block[0]) // len(positions) for block in blocks)
    for layer, blocks in enumerate(cache)
  }
  pages = tuple(sizes[window] for window in windows)
  tables = {name: params[name] for name in ('embed', 'positions') if name in params}
  x, (angles, views, growth) = _start(spec, tables, tokens, positions, step, prefixes, pages, page)
  real = None if config.experts is None else positions >= 0
  new_cache, counted, counts = [], [], iter(usage)
  for layer, blocks in enumerate(cache):
    kind, layer_params = config.kind(layer), params['layers'][layer]
    view, shared = views[windows.index(kind.window)], [p.cache[layer] for p in prefixes.entries]
    own = angles[rotations.index(rotation_of(config, layer))]
    arrays = x, blocks, shared, own, growth, view, real
    count = next(counts, None) if kind.sparse else None
    x, blocks, count = _layer(spec, kind, layer_params, *arrays, count)
    new_cache.append(blocks)
    counted += [] if count is None else [count]
  return x, tuple(new_cache), tuple(counted)


@functools.partial(jax.jit, static_argnames=('spec', 'sizes', 'page'))
def _start(
  spec: ForwardSpec,
  params: Params,
  tokens: jax.Array,
  positions: jax.Array,
  step: Step,
  prefixes: Prefixes,
  sizes: tuple[tuple[int, ...], ...],
  page: int,
) -> tuple[jax.Array, tuple[list[Angles | None], list[Any], jax.Array | None]]:
  """Return the embeddings, and what layers share.

  This is the angles of each of `rotations_of`, the view of each window, and `growth_of`.

  Args:
    spec, tokens, positions, step, prefixes: as in `forward_cached`.
    params: the parameters of the embeddings.
    sizes: for each window, the number of pages of each block in one batch shard.
    page: number of tokens of a page of attention layers.
  """

  def angles_and_views():
    views = [
      CACHED[spec.attention].make_view(positions, step, i, prefixes, sizes[i], page, window)
      if window != 0
      else delta_cache.make_view(positions, step, i, prefixes)
      for i, window in enumerate(windows_of(spec.config))
    ]
    angles = [rotary_angles(*rotation, positions) for rotation in rotations_of(spec.config)]
    return angles, views, growth_of(spec.config, positions)

  shared = compute_once(angles_and_views, positions)
  embed = _merge(spec.config, _embedding, params['embed'])
  learned = None
  if 'positions' in params:
    learned = _merge(spec.config, _position_embedding, params['positions'])
  x = embed_tokens(spec.config, embed, learned, tokens, positions, spec.dtype, differentiable=False)
  return jax.lax.with_sharding_constraint(x, spec.sharding), shared


@functools.partial(jax.jit, static_argnames=('spec', 'kind'), donate_argnames=('x', 'blocks'))
def _layer(
  spec: ForwardSpec,
  kind: LayerKind,
  params: Params,
  x: jax.Array,
  blocks: tuple[Any, ...],
  prefixes: list[Any],
  angles: Angles | None,
  growth: jax.Array | None,
  view: Any,
  real: jax.Array | None,
  usage: jax.Array | None,
) -> tuple[jax.Array, tuple[Any, ...], jax.Array | None]:
  mesh = cast(Mesh, spec.sharding.mesh)
  if kind.delta:
    attend = functools.partial(delta_cache.advance, prefixes=prefixes, view=view, mesh=mesh)
  else:
    attend = functools.partial(
      CACHED[spec.attention].attend,
      prefixes=prefixes,
      view=view,
      window=kind.window,
      width=spec.width,
      mesh=mesh,
      scores=scores_of(spec.config),
    )
  block = nnx.merge(_block_graph(spec.config, kind), params)
  x, blocks, routing = block(x, blocks, LayerContext(angles, attend, growth, real, mesh))
  if usage is not None:
    usage = jax.lax.with_sharding_constraint(usage + routing.counts, spec.sharding)
  return jax.lax.with_sharding_constraint(x, spec.sharding), blocks, usage


def hidden_logits(config: ModelConfig, params: Params, x: jax.Array) -> jax.Array:
  """Return the logits f32[...,V] for hidden states [...,D] before the last norm."""
  head = params['embed' if config.tied_embeddings else 'head']
  hidden = _merge(config, _last_norm, params['norm'])(x, ordered=True)
  return unembed(hidden, head['table'], logit_transform_of(config))


def _embedding(config: ModelConfig) -> Embedding:
  return Embedding(config.vocab_size, config.d_model, nnx.Rngs(0), jnp.float32)


def _position_embedding(config: ModelConfig) -> Embedding:
  return Embedding(config.max_positions, config.d_model, nnx.Rngs(0), jnp.float32)


def _last_norm(config: ModelConfig) -> Norm:
  return make_norm(config, jnp.float32)


def _merge(config: ModelConfig, make: Callable[[ModelConfig], Any], params: Params) -> Any:
  """Return a part of the model with its parameters."""
  return nnx.merge(_graph(config, make), params)


@functools.lru_cache
def _block_graph(config: ModelConfig, kind: LayerKind) -> nnx.GraphDef:
  return nnx.split(nnx.eval_shape(lambda: Block(config, kind, nnx.Rngs(0), jnp.float32)))[0]


@functools.lru_cache
def _graph(config: ModelConfig, make: Callable[[ModelConfig], Any]) -> nnx.GraphDef:
  return nnx.split(nnx.eval_shape(lambda: make(config)))[0]
