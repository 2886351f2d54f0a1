"""The gated delta rule over the cache: each row has one page, which holds its state.

Tokens are computed one after the other, with sums of fixed order, so that a state depends on the
row's tokens alone: not on how they are divided into chunks, nor on other rows. A row's first own
token begins with the state of its shared prefix, or with zeros, whatever its page holds.

`cai_jax.model.delta_rule` and `cai_jax.model.cache` define the axis letters. The first axis of
arrays with a value for each token counts batch shards, and X all tokens of a shard.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cai_jax.model.cache import Prefixes, StateCache, Step
from cai_jax.model.delta_rule import DeltaInputs, Kernels, convolve, recur
from cai_jax.runtime.mesh import BATCH, batch_shards


class StateView(NamedTuple):
  """Where tokens are, for all layers with states.

  Attributes:
    rows: i32[.,D], the page of each decoded row; the number of pages drops the write. None if no
      rows are decoded.
    pages: i32[.,T], the same for each prefilled token; None if there are none.
    number: i32[.], number of prefilled tokens without the padding behind them.
    real: bool[.,X], false for padding.
    first: bool[.,X], whether a token is the first after the row's shared prefix.
    choice: i32[.,X], index of the shared prefix; -1 if none.
  """

  rows: jax.Array | None
  pages: jax.Array | None
  number: jax.Array
  real: jax.Array
  first: jax.Array
  choice: jax.Array


def make_view(positions: jax.Array, step: Step, index: int, prefixes: Prefixes) -> StateView:
  """Return the view of the layers with states.

  Args:
    positions: i32[.,X]; a negative position marks padding.
    step: where the tokens are in the cache.
    index: index of the states' tables in `step`.
    prefixes: the prefixes, and the choice of one for each token.
  """
  length = jnp.zeros(positions.shape, jnp.int32)
  for i, prefix in enumerate(prefixes.entries):
    length = jnp.where(prefixes.choice == i, prefix.length, length)
  pages = None if step.pieces is None else step.pieces.tables[index].page
  real = positions >= 0
  number = jnp.zeros(len(positions), jnp.int32)
  if pages is not None:
    number = real[:, positions.shape[1] - pages.shape[1] :].sum(1, dtype=jnp.int32)
  rows = step.rows[index].pages[:, :, 0] if step.rows else None
  return StateView(rows, pages, number, real, positions == length, prefixes.choice)


def advance(
  inputs: DeltaInputs,
  kernels: Kernels,
  blocks: tuple[StateCache, ...],
  prefixes: Sequence[StateCache],
  view: StateView,
  mesh: Mesh,
) -> tuple[jax.Array, tuple[StateCache, ...]]:
  """Compute the tokens of a step, and update the states of their rows.

  Each device computes its own rows and heads; they do not communicate.

  Args:
    inputs: of the tokens [.,X,...], before the convolutions.
    kernels: the weights of the convolutions.
    blocks: the layer's states, in one block.
    prefixes: the layer's state after each shared prefix.
    view: where the tokens are.
    mesh: the mesh over which rows and heads are split.

  Returns:
    The output f32[.,X,K,G,U], and the updated states.
  """
  (states,) = blocks
  args = inputs, kernels, states, tuple(prefixes), view
  if mesh.size == 1:
    out, states = _advance_local(*args)
    return out, (states,)
  # The prefill of a shared prefix has a single group, which every batch shard computes as a whole.
  batch = tuple(BATCH) if len(inputs.q) == batch_shards(mesh) else (None,)
  heads, pages = P(*batch, None, 'tensor'), state_specs(batch)
  shared = (state_specs((None,)),) * len(prefixes)
  specs = heads, P('tensor'), pages, shared, P(*batch)
  run = jax.shard_map(
    _advance_local, mesh=mesh, in_specs=specs, out_specs=(heads, pages), check_vma=False
  )
  out, states = run(*args)
  return out, (states,)


def state_specs(batch: Sequence[str | tuple[str, ...] | None]) -> Any:
  """Return how the arrays of a `StateCache` are split.

  Args:
    batch: the mesh axes that split pages, or (None,).
  """
  inputs = P(*batch, None, 'tensor')
  specs: tuple[Any, ...] = P(*batch, 'tensor'), inputs, inputs, inputs
  return StateCache(*specs)


def _advance_local(inputs, kernels, states, prefixes, view):
  """Compute `advance` for one batch shard, whose first axis has the length 1."""
  inputs, view = jax.tree.map(lambda x: x[0], (inputs, view))
  total = len(inputs.q)
  decoded = total if view.pages is None else total - len(view.pages)
  begin = functools.partial(_begin, prefixes=prefixes)
  outs = []
  if view.rows is not None:
    rows = lambda x: x[:decoded].reshape(len(view.rows), -1, *x.shape[1:])  # noqa: E731
    own = jax.tree.map(lambda x: x.at[view.rows].get(mode='clip'), states)
    own = begin(own, rows(view.first)[:, 0], rows(view.choice)[:, 0])
    out, own = _advance_rows(jax.tree.map(rows, inputs), kernels, own, rows(view.real))
    states = jax.tree.map(lambda x, y: x.at[view.rows].set(y, mode='drop'), states, own)
    outs.append(out.reshape(decoded, *out.shape[2:]))
  if view.pages is not None:

    def add(number, carry):
      states, outs = carry
      at, page = decoded + number, view.pages[number]
      take = lambda x, index: jax.lax.dynamic_index_in_dim(x, index)  # noqa: E731
      own = jax.tree.map(lambda x: take(x, page), states)
      own = begin(own, take(view.first, at), take(view.choice, at))
      token = jax.tree.map(lambda x: take(x, at)[None], inputs)
      out, own = _advance_rows(token, kernels, own, take(view.real, at)[None])
      put = jax.lax.dynamic_update_index_in_dim
      states = jax.tree.map(lambda x, y: put(x, y, page, 0), states, own)
      return states, put(outs, out[0], number, 0)

    out = jnp.zeros((len(view.pages), *inputs.v.shape[1:]), jnp.float32)
    states, out = jax.lax.fori_loop(0, view.number, add, (states, out))
    outs.append(out)
  return jnp.concatenate(outs)[None], states


def _begin(states: StateCache, first, choice, prefixes) -> StateCache:
  """Return the states of rows before their tokens, with those of prefixes where they begin.

  Args:
    states: of B rows.
    first: bool[B], whether a row begins.
    choice: i32[B], its shared prefix.
    prefixes: the state after each prefix.
  """

  def select(own, *shared):
    flags = lambda x: x.reshape(-1, *[1] * (own.ndim - 1))  # noqa: E731
    start = jnp.zeros_like(own[:1])
    for i, x in enumerate(shared):
      start = jnp.where(flags(choice == i), x.astype(own.dtype), start)
    return jnp.where(flags(first), start, own)

  return jax.tree.map(select, states, *prefixes)


def _advance_rows(
  inputs: DeltaInputs, kernels: Kernels, states: StateCache, real: jax.Array
) -> tuple[jax.Array, StateCache]:
  """Return the outputs f32[B,T,K,G,U] of rows, and their states after T tokens.

  Args:
    inputs: of the tokens [B,T,...], before the convolutions.
    kernels: the weights of the convolutions.
    states: of the rows.
    real: bool[B,T], false for padding, which stands behind other tokens and changes no state.
  """
  before, tokens = states[1:], inputs[:3]
  q, k, v = (
    jax.nn.silu(convolve(x, kernel, earlier))
    for x, kernel, earlier in zip(tokens, kernels, before, strict=True)
  )
  hide = lambda x: jnp.where(real[..., None, None], x, 0)  # noqa: E731
  out, state = recur(DeltaInputs(q, k, v, hide(inputs.log_decay), hide(inputs.beta)), states.state)
  number = real.sum(1)

  def keep(x, earlier):
    """Return the last inputs of the convolution up to the last real token."""
    both = jnp.concatenate([earlier, x.astype(earlier.dtype)], 1)
    index = number[:, None] + jnp.arange(earlier.shape[1])
    index = index.reshape(*index.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(both, index, 1)

  kept = (keep(x, earlier) for x, earlier in zip(tokens, before, strict=True))
  return out, StateCache(state, *kept)
