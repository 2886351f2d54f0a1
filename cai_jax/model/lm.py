"""A language model in memory: parameters, tokenizer and mesh, with its logits."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from cai_jax.model.config import ModelConfig
from cai_jax.model.transformer import Transformer

Params = dict[str, Any]  # nested dict of arrays; layers stand under integer keys


@functools.lru_cache
def structure(
  config: ModelConfig, dtype: str = 'float32', param_dtype: str = 'float32'
) -> tuple[nnx.GraphDef, Params]:
  """The graph of a Transformer and its parameters as ShapeDtypeStructs; nothing is allocated.

  `nnx.merge(graph, params)` inside a jitted function gives the model back.
  """
  model = nnx.eval_shape(
    lambda: Transformer(config, nnx.Rngs(0), jnp.dtype(dtype), jnp.dtype(param_dtype))
  )
  graph, state = nnx.split(model)
  return graph, nnx.to_pure_dict(state)


def init_params(config: ModelConfig, key: jax.Array, param_dtype: str = 'float32') -> Params:
  """Randomly initialised parameters: normal with standard deviation fan_in^-1/2, unit norms."""

  def init(key):
    model = Transformer(config, nnx.Rngs(params=key), param_dtype=jnp.dtype(param_dtype))
    return nnx.to_pure_dict(nnx.split(model)[1])

  return jax.jit(init)(key)


@functools.partial(jax.jit, static_argnames='graph')
def _logits(graph, params, tokens, positions, segment_ids):
  model = nnx.merge(graph, params)
  hidden, _ = model(tokens, positions, segment_ids)
  return model.unembed(hidden)


@dataclasses.dataclass(frozen=True, eq=False)
class LM:
  """A causal language model with its tokenizer, placed on a mesh."""

  config: ModelConfig
  params: Params
  tokenizer: Any  # transformers.PreTrainedTokenizerFast
  mesh: Mesh
  dtype: str  # compute dtype
  name: str  # folder or hub name it came from
  fingerprint: str  # hex digest of config, dtype, weights and tokenizer: names it in the journal
  eos_token_ids: tuple[int, ...] = ()  # of generation_config.json

  @property
  def graph(self) -> nnx.GraphDef:
    """Static half of the model, for `nnx.merge(lm.graph, params)` in a jitted function."""
    return structure(self.config, self.dtype)[0]

  def logits(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Logits f32[B,T,V] of tokens i32[B,T].

    Args:
      tokens: i32[B,T].
      mask: bool or i32[B,T], nonzero on real tokens, for left- or right-padded rows. Positions
        count real tokens only; logits at padding mean nothing.
    """
    tokens = jnp.asarray(tokens)
    segments = jnp.ones(tokens.shape, jnp.int32) if mask is None else jnp.asarray(mask, jnp.int32)
    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    return _logits(self.graph, self.params, tokens, positions, None if mask is None else segments)
