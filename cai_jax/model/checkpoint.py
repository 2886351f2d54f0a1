"""Loading parameters from Hugging Face safetensors files, and saving them to such files."""

import contextlib
import functools
import math
import os
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from jax.sharding import Mesh

from cai_jax.model.checkpoint_checks import check_tensors, stored_weights
from cai_jax.model.config import ModelConfig
from cai_jax.model.families.weight_table import StoredWeight, join_parts, whole_tensor
from cai_jax.model.mxfp4 import Mxfp4Slice
from cai_jax.model.quantized.kernel import FULL, dequantize, is_quantized
from cai_jax.model.quantized_params import kernel_quantizer, quantizable
from cai_jax.model.sharding import flatten_params, param_shardings, path_str
from cai_jax.model.transformer import Params, abstract_model
from cai_jax.model.weight_files import (
  DTYPES,
  INDEX,
  SINGLE,
  STORED_DTYPES,
  StoredTensor,
  check_dtype,
  check_finite,
  check_weight,
  locate_weights,
  open_weights,
)
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import write_json
from cai_jax.runtime.mesh import to_host

MAX_SHARD_BYTES = 5_000_000_000


def load_params(
  folder: str | os.PathLike,
  config: ModelConfig,
  mesh: Mesh,
  param_dtype: str = 'float32',
  extra: Collection[str] = (),
  weights: str = FULL,
) -> Params:
  """Load the parameters of a Hugging Face folder, each shard directly onto its device.

  Args:
    folder: holds `model.safetensors`, or `model.safetensors.index.json` and its shards.
    config: the model's config.
    mesh: where the parameters go; `cai_jax.model.sharding.RULES` splits them.
    param_dtype: dtype of the result, whatever the files hold: 'float32', 'bfloat16' or 'float16'.
    extra: names of tensors that the files must contain in addition to the model's own;
      `load_weight` reads them.
    weights: format of the linear layers' kernels, see `cai_jax.model.quantized`. They are read in
      f32 and quantized one after the other.

  Raises:
    UserError: if a weight is missing, unused, or of an unexpected shape or dtype; if a file is
      damaged; if the folder has only pickled weights.
  """
  check_dtype(param_dtype, 'param_dtype')
  folder = pathlib.Path(folder)
  tensors = check_tensors(folder, config, extra)
  abstract = abstract_model(config, param_dtype=param_dtype)[1]
  shardings = param_shardings(abstract, mesh)
  table = stored_weights(config, tensors)
  quantized = {} if weights == FULL else quantizable(config)
  quantize = kernel_quantizer(config, weights, mesh)

  def load(path, leaf, sharding):
    name = path_str(path)
    stored, dtype = table[name], np.float32 if name in quantized else leaf.dtype
    # Reopened for each weight, because what has been read stays in memory until the file is closed.
    with contextlib.ExitStack() as opened:

      @functools.cache
      def open_file(file):
        return opened.enter_context(open_weights(file))

      def find(name):
        return open_slice(tensors[name], open_file)

      @functools.cache  # reads a shard once for all its replicas
      def read(starts, stops):
        block = stored.read_block(find, starts, stops)
        with np.errstate(over='ignore'):  # values beyond float16 are found below
          block = block.astype(dtype)
        stacked = stored.stacked is not None
        pieces = np.moveaxis(block, stored.stacked, 0) if stacked else [block]
        for key, piece in zip(stored.block_names(starts, stops), pieces, strict=True):
          check_finite(piece, tensors[key].name, tensors[key].path)
        return block

      def shard(index):
        ranges = [s.indices(size) for s, size in zip(index, leaf.shape, strict=True)]
        return read(tuple(r[0] for r in ranges), tuple(r[1] for r in ranges))

      return quantize(name, jax.make_array_from_callback(leaf.shape, sharding, shard))

  return jax.tree_util.tree_map_with_path(load, abstract, shardings)


def open_slice(tensor: StoredTensor, open_file: Callable[[pathlib.Path], Any]) -> Any:
  """Return an object that reads a tensor's blocks by their indices.

  Args:
    tensor: the tensor.
    open_file: returns an open safetensors file.
  """
  if tensor.parts:
    return Mxfp4Slice(*(open_slice(part, open_file) for part in tensor.parts))
  return open_file(tensor.path).get_slice(tensor.name)


def load_weight(folder: str | os.PathLike, name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Load one tensor of a Hugging Face folder by its name.

  Args:
    folder: the model's folder.
    name: name of the tensor in the files, such as 'score.weight'.
    shape: the shape that the tensor must have.

  Returns:
    f32[*shape].

  Raises:
    UserError: if the tensor is missing, or has another shape or an unsupported dtype.
  """
  folder = pathlib.Path(folder)
  tensors = locate_weights(folder)
  if name not in tensors:
    raise UserError(f'{folder}: weight {name!r} is missing.')
  check_weight(tensors[name], name, shape)
  with open_weights(tensors[name].path) as file:
    values = file.get_tensor(name).astype(np.float32)
  check_finite(values, name, tensors[name].path)
  return values


def stored_dtype(folder: str | os.PathLike, config: ModelConfig) -> str:
  """Return the dtype in which the files hold the embedding, such as 'bfloat16'.

  Args:
    folder: the model's folder.
    config: the model's config.

  Raises:
    UserError: if the files are damaged, or the embedding is missing or has an unsupported dtype.
  """
  tensors = check_tensors(pathlib.Path(folder), config)
  tensor = tensors[stored_weights(config)['embed/table'].names[0]]
  return dict(zip(STORED_DTYPES, DTYPES, strict=True))[tensor.dtype]


def check_params(
  folder: str | os.PathLike,
  config: ModelConfig,
  extra: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> None:
  """Check the names, shapes and dtypes of a folder's weights without reading their values.

  Args:
    folder: the model's folder.
    config: the model's config.
    extra: shapes of tensors that the files must contain in addition to the model's own, by name.

  Raises:
    UserError: as `load_params`.
  """
  tensors = check_tensors(pathlib.Path(folder), config, extra.keys())
  for name, shape in extra.items():
    check_weight(tensors[name], name, shape)


def save_params(
  folder: str | os.PathLike,
  params: Params,
  config: ModelConfig,
  dtype: str | None = None,
  max_shard_bytes: int = MAX_SHARD_BYTES,
  extra: Mapping[str, Any] = MappingProxyType({}),
) -> None:
  """Save parameters as `model.safetensors`, or as numbered shards with an index.

  Each file is written atomically, and the index last. In a run of several processes, every process
  must call this function; process 0 writes.

  Args:
    folder: created if it does not exist.
    params: the model's parameters, on any mesh. Quantized kernels are written as the numbers that
      they stand for.
    config: the model's config.
    dtype: dtype of the files; None keeps the dtype of each parameter, f32 for quantized kernels.
    max_shard_bytes: largest size of a file in bytes; a single weight may exceed it.
    extra: arrays that the files hold in addition to the model's parameters, by tensor name.

  Raises:
    UserError: if the dtype is unknown.
    ValueError: if `params` do not fit `config`.
  """
  if dtype is not None:
    check_dtype(dtype, 'dtype')
  leaves = flatten_params(params)
  _check_shapes(leaves, config)
  folder = pathlib.Path(folder)
  is_writer = jax.process_index() == 0
  if is_writer:
    folder.mkdir(parents=True, exist_ok=True)
  leaves |= extra
  stored = stored_weights(config)
  stored |= {name: whole_tensor(name, x.shape) for name, x in extra.items()}
  tensors = _list_parts(stored)
  dtypes = {
    name: np.dtype(DTYPES[dtype]) if dtype else _common_dtype([leaves[path] for path in paths])
    for name, (paths, _) in tensors.items()
  }
  sizes = {
    name: math.prod(stored[paths[0]].stored_shape) * dtypes[name].itemsize
    for name, (paths, _) in tensors.items()
  }
  shards = _split_shards(sizes, max_shard_bytes)
  weight_map: dict[str, str] = {}
  gathered: dict[str, Any] = {}  # the parameters in the last tensor: the next may have them too
  for number, names in enumerate(shards, 1):
    file = SINGLE if len(shards) == 1 else f'model-{number:05d}-of-{len(shards):05d}.safetensors'
    content = {}
    for name in names:
      paths, position = tensors[name]
      gathered = {path: gathered[path] for path in paths if path in gathered}
      for path in paths:
        if path not in gathered:
          # Gathers, so every process must take part.
          gathered[path] = to_host(dequantize(leaves[path]))
      if is_writer:
        parts = [(stored[path], gathered[path]) for path in paths]
        content[name] = join_parts(parts, position).astype(dtypes[name], copy=False)
    weight_map |= dict.fromkeys(names, file)
    if is_writer:
      _write_file(folder / file, content)
  if is_writer:
    if len(shards) > 1:
      index = {'metadata': {'total_size': sum(sizes.values())}, 'weight_map': weight_map}
      write_json(folder / INDEX, index)
    # Loading would prefer a leftover of an earlier save to the new files.
    (folder / (INDEX if len(shards) == 1 else SINGLE)).unlink(missing_ok=True)


def _common_dtype(parameters: Sequence[Any]) -> np.dtype:
  """Return a dtype that holds parameters; quantized kernels count as f32."""
  return np.result_type(*(np.float32 if is_quantized(x) else x.dtype for x in parameters))


def _write_file(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
  """Write a safetensors file atomically."""
  partial = path.with_name(f'{path.name}.partial')
  safetensors.numpy.save_file(tensors, partial, metadata={'format': 'pt'})
  partial.chmod(0o644)  # safetensors creates files that only their owner can read
  os.replace(partial, path)


def _list_parts(stored: Mapping[str, StoredWeight]) -> dict[str, tuple[list[str], int]]:
  """Return the paths of the parameters in each tensor, in its order, and its index in a stack.

  Args:
    stored: where each parameter is stored, by its path.
  """
  tensors: dict[str, tuple[list[str], int]] = {}
  for path, weight in stored.items():
    for index, name in enumerate(weight.names):
      tensors.setdefault(name, ([], index))[0].append(path)
  for paths, _ in tensors.values():
    paths.sort(key=lambda path: stored[path].offset)
  return tensors


def _check_shapes(leaves: dict[str, jax.Array], config: ModelConfig) -> None:
  """Check that parameters have the paths and shapes of a model."""
  shapes = {path: x.shape for path, x in leaves.items()}
  expected = {path: x.shape for path, x in flatten_params(abstract_model(config)[1]).items()}
  paths = sorted(shapes.keys() | expected.keys())
  if wrong := [path for path in paths if shapes.get(path) != expected.get(path)]:
    raise ValueError(
      f'params do not fit the config at {wrong[0]}: the shape is {shapes.get(wrong[0])} and should '
      f'be {expected.get(wrong[0])} ({len(wrong)} such parameters).'
    )


def _split_shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
  """Split names in order into shards of at most `limit` bytes, or of one name.

  Args:
    sizes: bytes by name.
    limit: bytes.
  """
  shards: list[list[str]] = [[]]
  filled = 0
  for name, size in sizes.items():
    if shards[-1] and filled + size > limit:
      shards.append([])
      filled = 0
    shards[-1].append(name)
    filled += size
  return shards
