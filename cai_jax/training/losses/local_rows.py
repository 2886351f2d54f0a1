"""Rows for computations on single positions, where a mesh splits the tokens of a row.

The logits of a batch are computed in slices of its rows. If the mesh axis `sequence` splits rows
into P parts, a slice of a row would be on one device only. Here, the part of a row that a device
holds becomes a row of its own, so that each device computes slices of its own positions.
"""

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cai_jax.model.attention.sequence import splits_rows


def to_local_rows(x: jax.Array, sharding: NamedSharding | None) -> jax.Array:
  """Return x [B,T,...] as [P·B,T/P,...]: the first parts of all rows, then the second ones.

  Args:
    x: an entry for each position.
    sharding: sharding of the batch's rows, or None on a single device.
  """
  if sharding is None or not splits_rows(sharding.mesh):
    return x
  parts = sharding.mesh.shape['sequence']
  rows, length = x.shape[:2]
  x = x.reshape(rows, parts, length // parts, *x.shape[2:]).swapaxes(0, 1)
  x = x.reshape(parts * rows, *x.shape[2:])
  place = NamedSharding(sharding.mesh, P(('sequence', 'data', 'fsdp')))
  return jax.lax.with_sharding_constraint(x, place)


def from_local_rows(x: jax.Array, sharding: NamedSharding | None) -> jax.Array:
  """Return x [P·B,T/P,...] as [B,T,...]; the inverse of `to_local_rows`."""
  if sharding is None or not splits_rows(sharding.mesh):
    return x
  parts = sharding.mesh.shape['sequence']
  x = x.reshape(parts, -1, *x.shape[1:]).swapaxes(0, 1)
  x = x.reshape(x.shape[0], -1, *x.shape[3:])
  return jax.lax.with_sharding_constraint(x, sharding)
