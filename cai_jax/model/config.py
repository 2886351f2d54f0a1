"""The configuration of a model: everything that defines it except its parameters."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from cai_jax.model.elementwise import ACTIVATIONS
from cai_jax.model.rope import Llama3Rope, LongRope, QueryGrowth, Rope, RopeScaling, lengthen
from cai_jax.runtime.errors import UserError

__all__ = ['Experts', 'LayerKind', 'Llama3Rope', 'ModelConfig', 'QueryGrowth', 'Rope']

NORMS = ('rms', 'layer')


def added(default: Any) -> Any:
  """Return a field of ModelConfig that fingerprints leave out while it has its default."""
  return dataclasses.field(default=default, metadata={'added': True})


@dataclasses.dataclass(frozen=True)
class Experts:
  """The feed-forward layers of a mixture of experts.

  Attributes:
    number: experts of a layer.
    per_token: experts that compute a token.
    d_ff: hidden channels of an expert.
    renormalize: whether the weights of a token's experts are divided by their sum.
    softmax_first: whether the softmax is over all experts, and not over those of the token alone,
      whose weights then sum to 1 anyway.
    dense_layers: numbers of layers that have an ordinary feed-forward layer, in ascending order.
    bias: whether the router and the linear layers of experts have a bias.
    limit: gates are clipped to at most this, and their factors `up` to between -limit and limit;
      None means no limit.
    up_offset: added to `up` after that.

  Raises:
    UserError: if a token cannot have as many experts, or the limit is not positive.
  """

  number: int
  per_token: int
  d_ff: int
  renormalize: bool = True
  softmax_first: bool = True
  dense_layers: tuple[int, ...] = ()
  bias: bool = added(False)
  limit: float | None = added(None)
  up_offset: float = added(0.0)

  def __post_init__(self):
    if not 1 <= self.per_token <= self.number:
      raise UserError(
        f'A token has {self.per_token} experts, but a layer has {self.number}. The experts of a '
        'token must be at least 1, and at most those of a layer.'
      )
    if self.limit is not None and not self.limit > 0:
      raise UserError(f'The limit of experts is {self.limit}; it must be positive.')


@dataclasses.dataclass(frozen=True)
class DeltaRule:
  """The layers with a gated delta rule in place of attention; see `cai_jax.model.delta_rule`.

  Attributes:
    layers: their numbers, in ascending order.
    key_heads: heads of queries and keys.
    value_heads: heads of values, a multiple of `key_heads`; each has a state.
    key_dim: channels of a query and of a key.
    value_dim: channels of a value.
    width: tokens over which the convolution of queries, keys and values looks, the token included.

  Raises:
    UserError: if the numbers of heads do not fit.
  """

  layers: tuple[int, ...]
  key_heads: int
  value_heads: int
  key_dim: int
  value_dim: int
  width: int

  def __post_init__(self):
    if self.value_heads % self.key_heads:
      raise UserError(
        f'A layer with a gated delta rule has {self.value_heads} value heads and {self.key_heads} '
        'key heads. The first number must be a multiple of the second; correct the wrong one.'
      )

  @property
  def channels(self) -> int:
    """The number of channels of all queries, keys and values, which pass the convolution."""
    return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

  def count_params(self, d_model: int) -> int:
    """Return the number of parameters that a layer has in place of those of attention.

    Args:
      d_model: channels of the residual stream.
    """
    values = self.value_heads * self.value_dim
    projections = d_model * (self.channels + 2 * values + 2 * self.value_heads)
    return projections + self.width * self.channels + 2 * self.value_heads + self.value_dim


class LayerKind(NamedTuple):
  """What layers of one model can differ in, besides rotary positions and the values of arrays.

  Attributes:
    window: the attention window in tokens, the query included; None means no limit.
    sparse: whether the feed-forward layer is a mixture of experts.
    kv_heads: key and value heads.
    head_dim: channels per head.
    values_from_keys: whether values are the projected keys; see `ModelConfig`.
    delta: the gated delta rule in place of attention, or None.
  """

  window: int | None
  sparse: bool
  kv_heads: int
  head_dim: int
  values_from_keys: bool
  delta: DeltaRule | None

  @property
  def cached(self) -> int:
    """How many numbers the keys and values of a token are."""
    return 2 * self.kv_heads * self.head_dim if self.delta is None else 0


# The fingerprint of a model, which is part of the journal's keys, contains the names and values of
# the fields of ModelConfig and of the classes in `rope.py`. Renaming a field makes old journals
# unusable. Declare a new field of ModelConfig with `added`: then the fingerprint leaves it out
# while it has its default (`runtime.settings.identity`).
@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The shape of a decoder-only transformer, and every choice in which families differ.

  The defaults are those of Llama (Touvron et al. 2023).

  Attributes:
    family: Hugging Face's model_type, a key of `cai_jax.model.families.family.FAMILIES`.
    vocab_size: number of token ids, and of rows of the embedding.
    d_model: channels of the residual stream.
    d_ff: hidden channels of the feed-forward layers.
    num_layers: number of blocks.
    num_heads: query heads.
    num_kv_heads: key and value heads; divides `num_heads`.
    head_dim: channels per head.
    head_dims: each layer's channels per head; an empty tuple gives all layers `head_dim`.
    kv_heads: each layer's key and value heads; an empty tuple gives all layers `num_kv_heads`.
    max_positions: the longest context, in tokens.
    rope_theta: base of the rotary frequencies.
    rope_scaling: scaling of the rotary frequencies, or None.
    norm_eps: added to the mean square in RMSNorm.
    tied_embeddings: whether the output layer uses the embedding's table.
    qkv_bias: whether query, key and value projections have a bias.
    output_bias: whether the attention's output projection has a bias.
    qk_norm: whether each head's query and key pass through an RMSNorm.
    value_norm: whether each head's value is divided by the root of its mean square, without a
      scale (Gemma 4).
    values_from_keys: for each layer, whether it has no projection of values, and the projected
      keys, before their norm and rotation, take their place (Gemma 4); an empty tuple means none.
    windows: each layer's attention window in tokens, None for a layer with full attention; an empty
      tuple gives all layers full attention.
    rope_channels: number of leading channels of a head that are rotated; None means all of them.
    rope_interleaved: whether the channels 2i and 2i + 1 are rotated together, and not i and
      i + channels / 2.
    ropes: each layer's rotary positions, None for a layer without; an empty tuple gives all layers
      `rope_theta`, `rope_scaling` and `rope_channels`.
    learned_positions: whether the embedding of the position is added to that of the token, and
      nothing is rotated (GPT-2).
    norm: 'rms' or 'layer' (with a mean and a bias; Ba et al. 2016).
    norm_offset: added to the scale of every RMSNorm; 1 in Gemma, whose checkpoints store scale - 1.
    pre_norm: whether attention and the feed-forward layer get a normalized input.
    post_norm: whether their outputs are normalized before they are added to the residual stream.
    parallel_blocks: whether the feed-forward layer gets the input of attention and not its result:
      x + attention(norm(x)) + mlp(norm(x)), with a norm for each.
    qk_norm_over_heads: whether `qk_norm` normalizes all heads of a token together (OLMo 2).
    activation: name of the activation, a key of `cai_jax.model.elementwise.ACTIVATIONS`.
    gated: whether the feed-forward layer is down(activation(gate(x)) · up(x)), and not
      down(activation(up(x))).
    mlp_bias: whether the linear layers of a feed-forward layer have a bias, except experts.
    query_scale: factor of the attention scores; None means head_dim^-1/2.
    query_growth: how queries grow with their position, or None.
    attention_cap: scores become cap · tanh(score / cap), before masking; None means no cap.
    sinks: whether each head has a learned score beside those of the keys, which has no value
      (Agarwal et al. 2025, section 2.2).
    embedding_scale: factor of the embeddings.
    layer_scalar: whether the residual stream after each layer is multiplied by a stored number of
      the layer, which training never changes (Gemma 4).
    residual_scale: factor of what a layer adds to the residual stream.
    logit_divisor: the logits are divided by it.
    experts: the mixture of experts, or None for a dense model.
    attention_gate: whether each channel of attention's result is multiplied by the sigmoid of a
      projection of its input, before the output projection.
    delta: the layers with a gated delta rule in place of attention, or None.
    logit_cap: logits become cap · tanh(logit / cap), after the division; None means no cap.

  Raises:
    UserError: if fields contradict each other.
  """

  family: str
  vocab_size: int
  d_model: int
  d_ff: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  max_positions: int
  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling | None = None
  norm_eps: float = 1e-5
  tied_embeddings: bool = False
  qkv_bias: bool = False
  output_bias: bool = False
  qk_norm: bool = False
  windows: tuple[int | None, ...] = ()
  rope_channels: int | None = added(None)
  rope_interleaved: bool = added(False)
  ropes: tuple[Rope | None, ...] = added(())
  learned_positions: bool = added(False)
  norm: str = added('rms')
  norm_offset: float = added(0.0)
  pre_norm: bool = added(True)
  post_norm: bool = added(False)
  parallel_blocks: bool = added(False)
  qk_norm_over_heads: bool = added(False)
  activation: str = added('silu')
  gated: bool = added(True)
  mlp_bias: bool = added(False)
  query_scale: float | None = added(None)
  query_growth: QueryGrowth | None = added(None)
  attention_cap: float | None = added(None)
  sinks: bool = added(False)
  embedding_scale: float = added(1.0)
  residual_scale: float = added(1.0)
  logit_divisor: float = added(1.0)
  logit_cap: float | None = added(None)
  experts: Experts | None = added(None)
  head_dims: tuple[int, ...] = added(())
  kv_heads: tuple[int, ...] = added(())
  value_norm: bool = added(False)
  values_from_keys: tuple[bool, ...] = added(())
  layer_scalar: bool = added(False)
  attention_gate: bool = added(False)
  delta: DeltaRule | None = added(None)

  def __post_init__(self):
    for name in ('windows', 'ropes', 'head_dims', 'kv_heads', 'values_from_keys'):
      entries = getattr(self, name)
      if entries and len(entries) != self.num_layers:
        raise UserError(f'{name} has {len(entries)} entries for {self.num_layers} layers.')
    for kv_heads in (self.num_kv_heads, *self.kv_heads):
      if self.num_heads % kv_heads:
        raise UserError(f'num_heads={self.num_heads} is not a multiple of num_kv_heads={kv_heads}.')
    smallest = min(self.head_dims, default=self.head_dim)
    if self.rope_channels is not None and not 2 <= self.rope_channels <= smallest:
      raise UserError(
        f'rope_channels is {self.rope_channels}; it must be between 2 and head_dim={smallest}.'
      )
    self._check_choices()

  def _check_choices(self):
    """Raise UserError for fields that name nothing, or that contradict each other."""
    if self.norm not in NORMS:
      raise UserError(f'norm={self.norm!r} must be one of {list(NORMS)}.')
    if self.activation not in ACTIVATIONS:
      raise UserError(f'activation={self.activation!r} must be one of {list(ACTIVATIONS)}.')
    if self.norm == 'layer' and self.norm_offset:
      raise UserError("norm_offset is for norm='rms'. Set it to 0, or change norm.")
    if self.qk_norm_over_heads and not self.qk_norm:
      raise UserError('qk_norm_over_heads has no effect without qk_norm. Set both, or none.')
    if not (self.pre_norm or self.post_norm):
      raise UserError('pre_norm and post_norm are both false. A block needs at least one of them.')
    if self.delta and not set(self.delta.layers) <= set(range(self.num_layers)):
      raise UserError(f'delta.layers={self.delta.layers} must be numbers below {self.num_layers}.')
    if self.experts and not self.gated:
      raise UserError('Experts have a gate. Set gated to true, or experts to None.')
    for name in ('attention_cap', 'logit_cap', 'query_scale', 'logit_divisor'):
      value = getattr(self, name)
      if value is not None and not value > 0:
        raise UserError(f'{name}={value} must be positive.')

  def window(self, layer: int) -> int | None:
    """Return a layer's attention window in tokens, the query included; None means no limit.

    A layer without attention, which keeps a state and no tokens, has the window 0.
    """
    if self.recurrent(layer):
      return 0
    return self.windows[layer] if self.windows else None

  def sparse(self, layer: int) -> bool:
    """Return whether a layer is a mixture of experts."""
    return self.experts is not None and layer not in self.experts.dense_layers

  def recurrent(self, layer: int) -> bool:
    """Return whether a layer has a gated delta rule in place of attention."""
    return self.delta is not None and layer in self.delta.layers

  def kind(self, layer: int) -> LayerKind:
    """Return what distinguishes a layer from others; layers of one kind compute the same."""
    return LayerKind(
      self.window(layer),
      self.sparse(layer),
      self.kv_heads[layer] if self.kv_heads else self.num_kv_heads,
      self.head_dims[layer] if self.head_dims else self.head_dim,
      bool(self.values_from_keys) and self.values_from_keys[layer],
      self.delta if self.recurrent(layer) else None,
    )

  @property
  def kinds(self) -> tuple[LayerKind, ...]:
    """The kind of each layer."""
    return tuple(map(self.kind, range(self.num_layers)))

  def rope(self, layer: int) -> Rope | None:
    """Return a layer's rotary positions; None means that nothing is rotated."""
    if self.ropes:
      return self.ropes[layer]
    if self.learned_positions:
      return None
    return Rope(self.rope_theta, self.rope_scaling, self.rope_channels)

  @property
  def long_context(self) -> bool:
    """Whether the long factors of a longrope scaling, and the whole context, are used."""
    ropes = (self.rope(layer) for layer in range(self.num_layers))
    return any(r and isinstance(r.scaling, LongRope) and r.scaling.long for r in ropes)

  @property
  def remarks(self) -> tuple[str, ...]:
    """How scalings of rotary frequencies limit the context, if they do."""
    ropes = (self.rope(layer) for layer in range(self.num_layers))
    remarks = (r.scaling.remark for r in ropes if r and r.scaling)
    return tuple(dict.fromkeys(remark for remark in remarks if remark))

  def with_long_context(self) -> 'ModelConfig':
    """Return the model with the long factors of its longrope scaling, and the whole context.

    Raises:
      UserError: if no layer has such a scaling with a longer context.
    """
    scaling = lengthen(self.rope_scaling)
    ropes = tuple(r and dataclasses.replace(r, scaling=lengthen(r.scaling)) for r in self.ropes)
    scalings = [r.scaling for r in ropes if r] or [scaling]
    contexts = [s.context for s in scalings if isinstance(s, LongRope)]
    if not contexts or min(contexts) <= self.max_positions:
      raise UserError(
        f'The context of this model holds {self.max_positions} tokens, and its config.json has no '
        'longrope scaling for a longer one. Set model.long_context to False.'
      )
    return dataclasses.replace(self, max_positions=min(contexts), rope_scaling=scaling, ropes=ropes)

  @property
  def num_params(self) -> int:
    """The number of parameters."""
    return self._count_params()

  @property
  def num_expert_params(self) -> int:
    """The number of parameters of all experts, without routers; 0 in a dense model."""
    if self.experts is None:
      return 0
    layers = sum(map(self.sparse, range(self.num_layers)))
    return layers * self.experts.number * self._count_expert(self.experts)

  def _count_params(self, active: bool = False) -> int:
    """Return the number of parameters.

    Args:
      active: whether only the experts that compute a token count.
    """
    attention = sum(map(self._count_attention, self.kinds))
    mlps = sum(self._count_mlp(layer, active) for layer in range(self.num_layers))
    per_channel = 2 if self.norm == 'layer' else 1
    normed = (self.pre_norm + self.post_norm) * 2 * self.num_layers + 1  # times d_model channels
    scalars = self.layer_scalar * self.num_layers
    embeddings = self.vocab_size * self.d_model * (1 if self.tied_embeddings else 2)
    embeddings += self.learned_positions * self.max_positions * self.d_model
    return embeddings + mlps + attention + per_channel * normed * self.d_model + scalars

  def _count_attention(self, kind: LayerKind) -> int:
    """Return the number of parameters of a layer's attention, with its norms of heads."""
    if kind.delta:
      return kind.delta.count_params(self.d_model)
    # Of queries, their gates, keys and values.
    heads = (1 + self.attention_gate) * self.num_heads
    heads += (1 if kind.values_from_keys else 2) * kind.kv_heads
    count = self.d_model * kind.head_dim * (heads + self.num_heads)
    count += self.qkv_bias * kind.head_dim * heads + self.output_bias * self.d_model
    count += self.sinks * self.num_heads
    normed = self.num_heads + kind.kv_heads if self.qk_norm_over_heads else 2
    per_channel = 2 if self.norm == 'layer' else 1
    return count + self.qk_norm * per_channel * normed * kind.head_dim

  def _count_mlp(self, layer: int, active: bool) -> int:
    """Return the number of parameters of a layer's feed-forward layer, with its router."""
    if self.experts is None or not self.sparse(layer):
      biases = self.mlp_bias * ((1 + self.gated) * self.d_ff + self.d_model)
      return (2 + self.gated) * self.d_model * self.d_ff + biases
    router = (self.d_model + self.experts.bias) * self.experts.number
    number = self.experts.per_token if active else self.experts.number
    return number * self._count_expert(self.experts) + router

  def _count_expert(self, experts: Experts) -> int:
    """Return the number of parameters of one expert."""
    return 3 * self.d_model * experts.d_ff + experts.bias * (2 * experts.d_ff + self.d_model)

  def training_flops(
    self, lengths: ArrayLike, adapters: bool = False, has_logits: bool = True
  ) -> float:
    """Return the FLOPs of matrix products that one training step needs.

    Per parameter and token, the forward pass takes 2 FLOPs and the backward pass takes 4. A table
    that is only looked up takes none, and neither do experts that do not compute the token.
    Attention counts only the pairs of tokens that the causal mask and the windows allow. A gated
    delta rule counts three products with the state for each token. Recomputation does not count.

    Args:
      lengths: i[n], number of tokens of each sequence.
      adapters: whether only low-rank adapters are trained, which needs no gradients of the other
        parameters.
      has_logits: whether logits are computed. A reward model has none.
    """
    lengths = np.asarray(lengths, np.float64)
    tables = (not self.tied_embeddings) + (not has_logits)
    looked_up = tables * self.vocab_size * self.d_model
    looked_up += self.learned_positions * self.max_positions * self.d_model
    products = (
      (4 if adapters else 6) * (self._count_params(active=True) - looked_up) * lengths.sum()
    )
    channels = 0.0  # of a head, in all pairs of tokens
    for kind in self.kinds:
      window = lengths if kind.window is None else np.minimum(lengths, kind.window)
      channels += kind.head_dim * (window * lengths - window * (window - 1) / 2).sum()
    if self.delta:
      state = self.delta.value_heads * self.delta.key_dim * self.delta.value_dim
      products += 3 * 6 * len(self.delta.layers) * state * lengths.sum()
    return products + 12 * self.num_heads * channels
