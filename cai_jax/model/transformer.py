"""A decoder-only transformer in the style of Llama (Touvron et al. 2023), in Flax NNX.

Axis letters, here and in all of `cai_jax.model`:

  B batch, T query, S key, D model, N heads, K kv heads, G heads per kv head, H head, F ffw,
  V vocabulary, L layer, X tokens of a flat batch.

Norms, rotary angles, softmax and logits are f32 in any compute dtype.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from cai_jax.model.attention.kernels.kernel import KERNELS, bind_kernel
from cai_jax.model.attention.mask import SharedTokens, causal_mask, segments_mask
from cai_jax.model.attention.rotary import growth_of, rotary_angles, rotation_of, rotations_of
from cai_jax.model.attention.scores import scores_of
from cai_jax.model.attention.sequence import run_by_heads, splits_rows
from cai_jax.model.attention.softmax import attend
from cai_jax.model.cache import windows_of
from cai_jax.model.config import ModelConfig
from cai_jax.model.delta_rule import run_texts, starts_of
from cai_jax.model.experts import Routing
from cai_jax.model.layers import Block, LayerContext, embed_tokens
from cai_jax.model.logits import LogitTransform, logit_transform_of
from cai_jax.model.parts import Embedding, make_norm
from cai_jax.model.precision import PRODUCT, einsum_f32
from cai_jax.model.stacks import SEPARATE, scan_layers

Params = dict[str, Any]  # nested dict of arrays; layers are under integer keys

# What the backward pass keeps of each block; it recomputes everything else. Products with
# parameters are selected by their checkpoint name, because the custom gradient of half-precision
# products hides them from policies that look for `dot_general`.
REMAT = {
  'none': None,  # keep everything
  'dots': jax.checkpoint_policies.save_only_these_names(PRODUCT),
  'full': jax.checkpoint_policies.nothing_saveable,  # keep only the block's input
}


LONGEST_MASK = 4096  # tokens of a row for which attention without a kernel makes a mask
LONG_ROWS = 'blocks'  # the kernel for longer rows; it runs on every device


class Transformer(nnx.Module):
  """A causal language model: calling it returns hidden states, and `unembed` returns logits.

  Args:
    config: the shape of the model.
    rngs: `rngs.params` draws the initial parameters.
    dtype: compute dtype.
    param_dtype: dtype of the parameters.
  """

  def __init__(
    self, config: ModelConfig, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32
  ):
    self.config = config
    self.dtype = dtype

    def embedding(size):
      return Embedding(size, config.d_model, rngs, param_dtype)

    self.embed = embedding(config.vocab_size)
    self.positions = embedding(config.max_positions) if config.learned_positions else None
    self.layers = nnx.List([Block(config, kind, rngs, param_dtype) for kind in config.kinds])
    # `arrange_layers` moves layers from one list to the other, and sets the layout.
    self.stacks: nnx.List[Block] = nnx.List([])
    self.layout = SEPARATE
    self.norm = make_norm(config, param_dtype)
    self.head = None if config.tied_embeddings else embedding(config.vocab_size)

  def __call__(
    self,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array | None = None,
    sharding: NamedSharding | None = None,
    remat: str = 'none',
    attention: str | None = None,
    allowed: jax.Array | None = None,
    last_segment_ids: jax.Array | None = None,
  ) -> jax.Array:
    """Return the hidden states [B,T,D] after the last norm, in the compute dtype.

    `cai_jax.model.cached_forward` is the forward with a cache.

    Args:
      tokens: i32[B,T].
      positions: i32[B,T], from 0 in each sequence.
      segment_ids: i32[B,T], for packed or padded rows: a token attends only to its own segment.
      sharding: sharding of the hidden states between blocks. Without it, XLA would split them over
        D as it splits the parameters, and each device would compute the logits of all rows.
      remat: what the backward pass recomputes, a key of `REMAT`.
      attention: name of the attention kernel for packed rows on a mesh; None computes attention
        with masks bool[B,T,T], or with the kernel `LONG_ROWS` if T exceeds `LONGEST_MASK`.
      allowed: bool[B,T,T], the tokens that each query may see besides being causal, for rows that
        branch. Excludes `segment_ids` and `attention`, and a gated delta rule.
      last_segment_ids: i32[B,T], the last segment that sees a token, for packed rows in which
        segments share tokens; see `SharedTokens`. Excludes a gated delta rule.

    Raises:
      ValueError: if arguments that exclude each other are given.
    """
    return self.forward(
      tokens, positions, segment_ids, sharding, remat, attention, allowed, last_segment_ids
    )[0]

  def forward(
    self,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array | None = None,
    sharding: NamedSharding | None = None,
    remat: str = 'none',
    attention: str | None = None,
    allowed: jax.Array | None = None,
    last_segment_ids: jax.Array | None = None,
  ) -> tuple[jax.Array, Routing | None]:
    """Return the hidden states, and how each layer of experts has divided all tokens.

    The arguments are those of `__call__`.

    Returns:
      The hidden states [B,T,D]; and the routing, with a first axis for the layers that are mixtures
      of experts. A dense model has None in its place.
    """
    self._check_branches(segment_ids, attention, allowed, last_segment_ids)
    shared = None if last_segment_ids is None else SharedTokens(last_segment_ids, positions)

    def constrain(x):
      return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)

    def angles_and_masks():
      masks = self._masks(positions, segment_ids, attention, allowed, last_segment_ids)
      angles = [rotary_angles(*rotation, positions) for rotation in rotations]
      return angles, masks, growth_of(self.config, positions)

    if attention is None and allowed is None and tokens.shape[1] > LONGEST_MASK:
      attention = LONG_ROWS
      if segment_ids is None:
        segment_ids = jnp.ones_like(tokens)

    rotations = rotations_of(self.config)
    angles, masks, growth = compute_once(angles_and_masks, positions)
    attends = self._attend_to_tokens(masks, segment_ids, attention, sharding, shared)
    x = embed_tokens(
      self.config, self.embed, self.positions, tokens, positions, self.dtype, differentiable=True
    )
    x = constrain(x)
    real = None if segment_ids is None else segment_ids > 0
    mesh = None if sharding is None else cast(Mesh, sharding.mesh)

    def apply(block, x, layer, in_loop=False):
      own = angles[rotations.index(rotation_of(self.config, layer))]
      context = LayerContext(own, attends[layer], growth, real, mesh)

      # A closure, because modules are not pytrees. JAX also differentiates what it closes over.
      def run(x):
        x, _, routing = block(x, None, context)
        return x, routing

      if remat != 'none':
        # In a loop, XLA cannot merge a layer of the forward pass with its repetition.
        run = jax.checkpoint(run, policy=REMAT[remat], prevent_cse=not in_loop)
      x, routing = run(x)
      return constrain(x), routing

    if self.layout.runs:
      x, routings = scan_layers(self.layout, self.stacks, apply, x)
    else:
      x, routings = self._unrolled(apply, x)
    if not routings:
      return self.norm(x), None
    return self.norm(x), jax.tree.map(lambda *rows: jnp.concatenate(rows).sum(1), *routings)

  def _check_branches(self, segment_ids, attention, allowed, last_segment_ids) -> None:
    """Check that the arguments of `__call__` do not exclude each other."""
    branches = allowed is not None or last_segment_ids is not None
    if branches and self.config.delta is not None:
      raise ValueError('A state cannot branch: a gated delta rule excludes this argument.')
    if allowed is not None and not (segment_ids is None and attention is None):
      raise ValueError('allowed excludes segment_ids and attention.')

  def _unrolled(self, apply: Callable[..., Any], x: jax.Array) -> tuple[jax.Array, list[Routing]]:
    """Return what `scan_layers` returns, for separate layers."""
    routings = []
    for layer, block in enumerate(self.layers):
      x, routing = apply(block, x, layer)
      routings += [] if routing is None else [routing]
    return x, jax.tree.map(lambda row: row[None], routings)

  def _masks(
    self, positions, segment_ids, attention, allowed, last_segment_ids
  ) -> list[jax.Array | None]:
    """Return the mask bool[B,T,T] of each window of `windows_of`; None where none is needed."""
    windows = windows_of(self.config)
    if attention is not None and not KERNELS[attention].takes_mask:
      return [None] * len(windows)
    if segment_ids is not None:
      allowed = segments_mask(segment_ids, segment_ids, last_segment_ids)
    return [
      None if window == 0 else causal_mask(positions, positions, window, allowed)
      for window in windows
    ]

  def _attend_to_tokens(self, masks, segment_ids, attention, sharding, shared) -> list[Callable]:
    """Return each layer's `LayerContext.attend` to the tokens of the batch."""
    windows, kernel, scores = windows_of(self.config), None, scores_of(self.config)
    mesh = None if sharding is None else sharding.mesh
    if attention is not None:
      kernel = bind_kernel(attention, segment_ids, mesh, scores, shared)

    starts = None if self.config.delta is None or segment_ids is None else starts_of(segment_ids)

    def attend_with(window):
      if window == 0:
        run = functools.partial(run_texts, starts=starts)
        return run_by_heads(run, mesh) if mesh is not None and splits_rows(mesh) else run
      mask = masks[windows.index(window)]
      if kernel is None:
        return functools.partial(attend, mask=mask, scores=scores)
      return functools.partial(kernel, window=window, **({} if mask is None else {'mask': mask}))

    return [attend_with(self.config.window(layer)) for layer in range(self.config.num_layers)]

  def unembed(self, hidden: jax.Array) -> jax.Array:
    """Return the logits f32[...,V] of hidden states [...,D]."""
    return unembed(hidden, self.output_table, self.logit_transform)

  @property
  def logit_transform(self) -> LogitTransform:
    """How products of hidden states and the output table become logits."""
    return logit_transform_of(self.config)

  @property
  def output_table(self) -> jax.Array:
    """The table [V,D] of the output layer, in the dtype of the parameters."""
    return (self.embed if self.head is None else self.head).table[...]


def unembed(hidden: jax.Array, table: jax.Array, transform: LogitTransform) -> jax.Array:
  """Return the logits f32[...,V] of hidden states.

  Args:
    hidden: [...,D], after the last norm.
    table: [V,D], the table of the output layer.
    transform: divisor and cap of the logits.
  """
  return transform.of_products(einsum_f32('...D,VD->...V', hidden, table.astype(hidden.dtype)))


def compute_once(compute: Callable[[], Any], positions: jax.Array) -> Any:
  """Return compute(), and prevent XLA from computing it again at each use of the result.

  On accelerators an optimization barrier does this. On CPUs, XLA removes barriers before it fuses
  operations, so each layer would compute the sines of the same angles again; that took a third of
  the embedded model's prefill. There, the function computes the result in a conditional, which XLA
  does not fuse. The condition is always true, but XLA cannot know that.

  Args:
    compute: returns a pytree of arrays.
    positions: i32, smaller than 2^30.
  """

  def conditional():
    zeros = lambda: jax.tree.map(jnp.zeros_like, jax.eval_shape(compute))  # noqa: E731
    return jax.lax.cond(positions.max() < 2**30, compute, zeros)

  return jax.lax.platform_dependent(
    cpu=conditional, default=lambda: jax.lax.optimization_barrier(compute())
  )


@functools.lru_cache
def abstract_model(
  config: ModelConfig, dtype: str = 'float32', param_dtype: str = 'float32'
) -> tuple[nnx.GraphDef, Params]:
  """Return the graph and the abstract parameters of a Transformer without allocating anything.

  Inside a jitted function, `nnx.merge(graph, params)` returns the model.

  Args:
    config: the shape of the model.
    dtype: compute dtype.
    param_dtype: dtype of the parameters.

  Returns:
    The graph, and the parameters as ShapeDtypeStructs.
  """
  model = nnx.eval_shape(
    lambda: Transformer(config, nnx.Rngs(0), jnp.dtype(dtype), jnp.dtype(param_dtype))
  )
  graph, state = nnx.split(model)
  return graph, nnx.to_pure_dict(state)


@functools.partial(jax.jit, static_argnames=('config', 'param_dtype'))
def init_params(config: ModelConfig, key: jax.Array, param_dtype: str = 'float32') -> Params:
  """Draw initial parameters: normal with standard deviation fan_in^-1/2; norm scales are 1.

  For layers that write to the residual stream, the standard deviation is divided by (2L)^1/2
  (Radford et al. 2019, section 2.3).

  Args:
    config: the shape of the model.
    key: a JAX random key.
    param_dtype: dtype of the parameters.
  """
  model = Transformer(config, nnx.Rngs(params=key), param_dtype=jnp.dtype(param_dtype))
  return nnx.to_pure_dict(nnx.split(model)[1])
