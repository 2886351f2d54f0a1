"""Attention in rows whose tokens are split over the mesh axis `sequence`.

Every other part of a layer computes each token on its own, so its tokens stay where they are. For
attention, the devices along `sequence` exchange tokens for heads, and back afterwards (Jacobs et
al. 2023, DeepSpeed Ulysses, section 3): a device holds some tokens of all heads before, and all
tokens of some heads during attention. It then computes whole rows. So every kernel works as it is,
with its windows, caps, sinks and segments, and gives each head what it gives it on one device. All
devices have the same work, whatever the segments are. In a ring (Liu et al. 2023), every kernel
would need its partial softmaxes, and devices with late tokens or long segments would make the
others wait.

The price is a limit: `tensor` × `sequence` must divide the number of query heads. Heads of keys may
be fewer; they are then copied, and each device has one copy of those that its queries need.

`cai_jax.model.transformer` defines the axis letters.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cai_jax.model.config import ModelConfig
from cai_jax.model.delta_rule import DeltaInputs, Kernels
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import BATCH, HEADS, TOKENS

AnyMesh = Mesh | AbstractMesh


def splits_rows(mesh: AnyMesh) -> bool:
  """Return whether a mesh splits the tokens of a row."""
  return mesh.shape.get('sequence', 1) > 1


def head_shards(mesh: AnyMesh) -> int:
  """Return the number of parts into which attention splits the heads of a row."""
  return math.prod(mesh.shape[axis] for axis in HEADS)


def check_sequence(mesh: AnyMesh, length: int, model: ModelConfig) -> None:
  """Check that the mesh can split rows of a length, and the heads of a model.

  Args:
    mesh: the devices.
    length: number of tokens per row.
    model: the shape of the model.

  Raises:
    UserError: if `sequence` does not divide the length, or `tensor` × `sequence` the heads.
  """
  if not splits_rows(mesh):
    return
  sequence = mesh.shape['sequence']
  if length % sequence:
    raise UserError(
      f'mesh.sequence={sequence} does not divide rows of {length} tokens. Use rows of a multiple '
      f'of {sequence}, such as {-(-length // sequence) * sequence}.'
    )
  parts, heads = head_shards(mesh), {'query heads': model.num_heads}
  if model.delta is not None:
    heads['heads of the gated delta rule'] = model.delta.key_heads
  for name, number in heads.items():
    if number % parts:
      raise UserError(
        f'mesh.tensor × mesh.sequence = {parts} does not divide the {number} {name} of the model, '
        'which attention splits over these devices. Their product may be one of '
        f'{[n for n in range(1, number + 1) if number % n == 0]}.'
      )


def _place(x: jax.Array, mesh: AnyMesh, spec: P) -> jax.Array:
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def to_heads(x: jax.Array, mesh: AnyMesh) -> jax.Array:
  """Exchange the tokens of x [B,T,N,...] for heads. Both places hold for the gradient, too."""
  return _place(_place(x, mesh, P(*TOKENS, 'tensor')), mesh, P(*BATCH, None, HEADS))


def to_tokens(x: jax.Array, mesh: AnyMesh) -> jax.Array:
  """Exchange the heads of x [B,T,N,...] for tokens; the inverse of `to_heads`."""
  return _place(_place(x, mesh, P(*BATCH, None, HEADS)), mesh, P(*TOKENS, 'tensor'))


def attend_by_heads(
  attend: Callable[..., jax.Array], rows: dict[str, Any], mesh: AnyMesh
) -> Callable[..., jax.Array]:
  """Return a kernel's attention for rows whose tokens are split.

  Args:
    attend: computes whole rows; it takes q, k, v and `rows`.
    rows: keyword arguments of `attend` that say what segments the rows have: arrays [B,T].
    mesh: the devices.

  Returns:
    A function of q, k, v and the other arguments of `attend`.
  """
  rows = jax.tree.map(lambda x: _place(x, mesh, BATCH), rows)
  attend = functools.partial(attend, **rows)

  def run(q, k, v, **options):
    kv_heads = k.shape[2]
    copies = math.lcm(kv_heads, head_shards(mesh)) // kv_heads
    if copies > 1:  # query heads n and n + 1 still share a head if they did before
      k, v = (jnp.repeat(x, copies, axis=2) for x in (k, v))
    q, k, v = (to_heads(x, mesh) for x in (q, k, v))
    return to_tokens(attend(q, k, v, **options), mesh)

  return run


def run_by_heads(
  run_texts: Callable[[DeltaInputs, Kernels], jax.Array], mesh: AnyMesh
) -> Callable[[DeltaInputs, Kernels], jax.Array]:
  """Return a gated delta rule for rows whose tokens are split. Its heads do not depend on others.

  Args:
    run_texts: computes whole rows.
    mesh: the devices.
  """

  def run(inputs, kernels):
    inputs = jax.tree.map(lambda x: to_heads(x, mesh), inputs)
    return to_tokens(run_texts(inputs, kernels), mesh)

  return run
