"""How each parameter is split over the mesh."""

import re

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cai_jax.runtime.errors import UserError

# Parameter path (as `path_str` writes it) → sharding. Exactly one rule matches each parameter.
RULES = (
  (r'(embed|head)/table', P('tensor', 'fsdp')),  # [V,D]
  (r'.*attention/(query|key|value)/kernel', P('fsdp', 'tensor', None)),  # [D,N,H]
  (r'.*attention/(query|key|value)/bias', P('tensor', None)),  # [N,H]
  (r'.*attention/output/kernel', P('tensor', None, 'fsdp')),  # [N,H,D]
  (r'.*attention/output/bias', P()),  # [D]
  (r'.*mlp/(gate|up)/kernel', P('fsdp', 'tensor')),  # [D,F]
  (r'.*mlp/down/kernel', P('tensor', 'fsdp')),  # [F,D]
  # Adapters: A [I,r] and B [r,O] lie as their kernel does, whose axes are merged.
  (r'.*(query|key|value|gate|up)/adapter/a', P('fsdp', None)),
  (r'.*(query|key|value|gate|up)/adapter/b', P(None, 'tensor')),
  (r'.*(output|down)/adapter/a', P('tensor', None)),
  (r'.*(output|down)/adapter/b', P(None, 'fsdp')),
  (r'(.*/)?(attention_norm|mlp_norm|norm|q_norm|k_norm)/scale', P()),  # [D] or [H]
)


def path_str(path) -> str:
  """'layers/0/mlp/up/kernel' for the key path of a leaf."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def spec_of(path: str) -> P:
  """The PartitionSpec of a parameter by its path.

  Raises:
    ValueError: if no rule matches, or more than one does.
  """
  matches = [spec for pattern, spec in RULES if re.fullmatch(pattern, path)]
  if len(matches) != 1:
    raise UserError(
      f'{len(matches)} sharding rules match parameter {path!r}; parallel.RULES needs exactly one.'
    )
  return matches[0]


def param_shardings(params, mesh: Mesh):
  """NamedShardings of a parameter pytree (arrays or ShapeDtypeStructs), in its structure.

  Raises:
    ValueError: if an axis of the mesh does not divide the dimension that it splits.
  """

  def sharding(path, leaf):
    name = path_str(path)
    spec = spec_of(name)
    for size, axis in zip(leaf.shape, spec, strict=False):
      if axis is not None and size % mesh.shape[axis]:
        fits = [n for n in range(1, mesh.size + 1) if size % n == 0]
        raise UserError(
          f'mesh axis {axis}={mesh.shape[axis]} does not divide dimension {size} of {name} '
          f'{leaf.shape}; {axis} may be one of {fits}.'
        )
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(sharding, params)


def localise(params, mesh: Mesh, dtype):
  """A copy of a parameter pytree on a mesh of this process's devices, in `dtype`.

  Parameters that lie on other hosts too go through this one's memory, all of them; then each
  process of the run must call it.
  """
  if jax.process_count() > 1:
    params = multihost_utils.process_allgather(params, tiled=True)
  shardings = param_shardings(params, mesh)
  return jax.tree.map(
    lambda x, sharding: jnp.array(jax.device_put(x, sharding), dtype, copy=True), params, shardings
  )
