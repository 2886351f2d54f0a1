"""The sharding of parameters: how each one is split over the mesh."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cai_jax.model.quantized.kernel import dequantize, is_quantized, map_params
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import SHARDS

# Pattern of the parameter's path → partition spec. Each parameter matches exactly one pattern.
RULES = (
  (r'(embed|head|positions)/table', P('tensor', SHARDS)),  # [V,D] or [positions, D]
  (r'score/table', P()),  # [C,D] of a reward model; so small that each device has all of it
  (r'.*(attention|delta)/(query|key|value|gate)/kernel', P(SHARDS, 'tensor', None)),  # [D,N,H]
  (r'.*attention/(query|key|value|gate)/bias', P('tensor', None)),  # [N,H]
  (r'.*(attention|delta)/output/kernel', P('tensor', None, SHARDS)),  # [N,H,D]
  (r'.*delta/(rate|decay)/kernel', P(SHARDS, 'tensor')),  # [D,N]
  (r'.*delta/decay/(bias|scale)', P('tensor')),  # [N]
  (r'.*delta/(query|key|value)_conv/kernel', P('tensor', None, None)),  # [N,H,W]
  (r'.*attention/output/bias', P()),  # [D]
  (r'.*attention/sinks', P('tensor')),  # [N]
  (r'.*mlp/(gate|up)/kernel', P(SHARDS, 'tensor')),  # [D,F]
  (r'.*mlp/down/kernel', P('tensor', SHARDS)),  # [F,D]
  (r'.*mlp/router/kernel', P(SHARDS, None)),  # [D,E]
  (r'.*mlp/experts/(gate|up)/kernel', P('expert', SHARDS, 'tensor')),  # [E,D,F]
  (r'.*mlp/experts/down/kernel', P('expert', 'tensor', SHARDS)),  # [E,F,D]
  (r'.*mlp/router/bias', P()),  # [E]
  (r'.*mlp/experts/(gate|up)/bias', P('expert', 'tensor')),  # [E,F]
  (r'.*mlp/experts/down/bias', P('expert', None)),  # [E,D]
  (r'.*mlp/(gate|up)/bias', P('tensor')),  # [F]
  (r'.*mlp/down/bias', P()),  # [D]
  # Adapters A [I,r] and B [r,O] are split like the kernel whose merged axes they have.
  (r'.*(query|key|value|gate|up|rate)/adapter/a', P(SHARDS, None)),
  (r'.*(query|key|value|gate|up|rate)/adapter/b', P(None, 'tensor')),
  (r'.*(output|down)/adapter/a', P('tensor', None)),
  (r'.*(output|down)/adapter/b', P(None, SHARDS)),
  (r'(layers|stacks)/\d+/scalar', P()),  # []
  (r'(.*/)?((attention|mlp)_(post_)?norm|norm|q_norm|k_norm)/(scale|bias)', P()),  # [D] or [H]
)

# An array of a quantized kernel: it is split like the kernel, except along axes of size 1.
_QUANTIZED = re.compile(r'(.*/kernel)/\w+')


def path_str(path) -> str:
  """Return the path of a leaf of a pytree as text, such as 'layers/0/mlp/up/kernel'.

  Args:
    path: a key path, such as those of `jax.tree_util.tree_map_with_path`.
  """
  return jax.tree_util.keystr(path, simple=True, separator='/')


def flatten_params(params: Any) -> dict[str, Any]:
  """Return the leaves of a pytree of parameters by path, in the order of the tree.

  Args:
    params: a pytree of nested dicts. A quantized kernel is one leaf.
  """
  leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)[0]
  return {path_str(path): leaf for path, leaf in leaves}


def partition_spec(path: str) -> P:
  """Return the partition spec of the parameter at a path.

  A stack of layers (`cai_jax.model.stacks`) has one more axis in front, which is not split.

  Args:
    path: such as 'layers/0/mlp/up/kernel'.

  Raises:
    ValueError: if `RULES` has no rule for the parameter, or more than one.
  """
  specs = [spec for pattern, spec in RULES if re.fullmatch(pattern, path)]
  if len(specs) != 1:
    raise ValueError(
      f'{len(specs)} sharding rules match parameter {path!r}. RULES in cai_jax/model/sharding.py '
      'must have exactly one that does.'
    )
  return P(None, *specs[0]) if path.startswith('stacks/') else specs[0]


def param_shardings(params: Any, mesh: Mesh) -> Any:
  """Return the sharding of each parameter on a mesh.

  Args:
    params: a pytree of arrays or ShapeDtypeStructs.
    mesh: the mesh.

  Returns:
    A pytree of NamedShardings with the structure of `params`.

  Raises:
    UserError: if the size of a mesh axis does not divide the dimension that the axis splits.
  """

  def sharding(path, leaf):
    name = path_str(path)
    kernel, is_part = _QUANTIZED.subn(r'\1', name)
    spec = partition_spec(kernel)
    if is_part:
      spec = P(*(None if n == 1 else axis for n, axis in zip(leaf.shape, spec, strict=True)))
    for size, axes in zip(leaf.shape, spec, strict=False):
      axes = (axes,) if isinstance(axes, str) else axes or ()
      parts = math.prod(mesh.shape[axis] for axis in axes)
      if size % parts:
        used = [axis for axis in axes if mesh.shape[axis] > 1]
        divisors = [n for n in range(1, mesh.size + 1) if size % n == 0]
        raise UserError(
          f'mesh axis {" × ".join(used)}={parts} does not divide dimension {size} of {name} '
          f'{leaf.shape}. {" × ".join(used)} may be one of {divisors}.'
        )
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(sharding, params)


def reshard(params: Any, mesh: Mesh, dtypes: Sequence[str]) -> Any:
  """Return parameters on another mesh of the same devices. No host has to hold all of them.

  Args:
    params: a pytree of arrays on a mesh. All processes of that mesh call this together.
    mesh: the other mesh.
    dtypes: to which the parameters are cast, one after the other, such as the dtype of a file and
      then that in which the file would be loaded.
  """

  def move(x, sharding):
    for dtype in dtypes:  # not in one program, from which XLA may leave out a cast
      x = x.astype(dtype)
    return jax.device_put(x, sharding)

  return jax.tree.map(move, params, param_shardings(params, mesh))


def copy_to_local_mesh(params: Any, mesh: Mesh, dtype) -> Any:
  """Return a copy of parameters on a mesh of this process's devices.

  With several processes, every process must call this function, and for a moment holds all
  parameters in host memory.

  Args:
    params: a pytree of arrays on any mesh. Quantized kernels become arrays.
    mesh: devices of this process.
    dtype: dtype of the copy.
  """
  if jax.process_count() > 1:
    params = multihost_utils.process_allgather(params, tiled=True)
  whole = jax.eval_shape(lambda params: map_params(dequantize, params), params)

  def copy(x: Any, sharding: NamedSharding) -> jax.Array:
    return jnp.array(jax.device_put(dequantize(x, dtype), sharding), dtype, copy=True)

  # One parameter after the other: the whole may not fit twice in full precision.
  return map_params(copy, params, param_shardings(whole, mesh))
