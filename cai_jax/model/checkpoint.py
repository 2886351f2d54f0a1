"""Loading parameters from Hugging Face safetensors files, and saving them to such files."""

import functools
import logging
import math
import os
import pathlib
from collections.abc import Collection, Mapping
from types import MappingProxyType

import jax
import numpy as np
import safetensors.numpy
from jax.sharding import Mesh

from cai_jax.model.config import ModelConfig
from cai_jax.model.families.family import FAMILIES, StoredWeight
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
  is_buffer,
  locate_weights,
  open_weights,
)
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import write_json
from cai_jax.runtime.mesh import to_host

MAX_SHARD_BYTES = 5_000_000_000

log = logging.getLogger(__name__)


def load_params(
  folder: str | os.PathLike,
  config: ModelConfig,
  mesh: Mesh,
  param_dtype: str = 'float32',
  extra: Collection[str] = (),
) -> Params:
  """Load the parameters of a Hugging Face folder, each shard directly onto its device.

  Args:
    folder: holds `model.safetensors`, or `model.safetensors.index.json` and its shards.
    config: the model's config.
    mesh: where the parameters go; `cai_jax.model.sharding.RULES` splits them.
    param_dtype: dtype of the result, whatever the files hold: 'float32', 'bfloat16' or 'float16'.
    extra: names of tensors that the files must contain in addition to the model's own;
      `load_weight` reads them.

  Raises:
    UserError: if a weight is missing, unused, or of an unexpected shape or dtype; if a file is
      damaged; if the folder has only pickled weights.
  """
  check_dtype(param_dtype, 'param_dtype')
  folder = pathlib.Path(folder)
  tensors = _check_tensors(folder, config, extra)
  abstract = abstract_model(config, param_dtype=param_dtype)[1]
  shardings = param_shardings(abstract, mesh)
  find_weight = FAMILIES[config.family].find_weight

  def load(path, leaf, sharding):
    stored = find_weight(path_str(path))
    # Reopened for each weight, because what has been read stays in memory until the file is closed.
    with open_weights(tensors[stored.name].path) as file:
      tensor = file.get_slice(stored.name)

      @functools.cache  # reads a shard once for all its replicas
      def read(starts, stops):
        block = stored.read_block(tensor, leaf.shape, starts, stops)
        with np.errstate(over='ignore'):  # values beyond float16 are found below
          block = block.astype(leaf.dtype)
        check_finite(block, stored.name, tensors[stored.name].path)
        return block

      def shard(index):
        ranges = [s.indices(size) for s, size in zip(index, leaf.shape, strict=True)]
        return read(tuple(r[0] for r in ranges), tuple(r[1] for r in ranges))

      return jax.make_array_from_callback(leaf.shape, sharding, shard)

  return jax.tree_util.tree_map_with_path(load, abstract, shardings)


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
  stored = FAMILIES[config.family].find_weight('embed/table')
  tensor = _check_tensors(pathlib.Path(folder), config)[stored.name]
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
  tensors = _check_tensors(pathlib.Path(folder), config, extra.keys())
  for name, shape in extra.items():
    check_weight(tensors[name], name, shape)


def _check_tensors(
  folder: pathlib.Path, config: ModelConfig, extra: Collection[str] = ()
) -> dict[str, StoredTensor]:
  """Check that the files hold the model that config.json describes, and return their tensors."""
  tensors = locate_weights(folder)
  # Before anything of the described size is built: the config may be damaged. If only a few weights
  # are missing, the messages below say more.
  elements = sum(math.prod(tensor.shape) for tensor in tensors.values())
  if config.num_params > 2 * elements:
    raise UserError(
      f'{folder}: config.json describes a {config.family} model of {config.num_params:,} '
      f'parameters, but the weight files hold {elements:,}. Use the config.json and the weights of '
      'one model.'
    )
  stored_weights = _stored_weights(config)
  _check_names(set(tensors), {w.name for w in stored_weights.values()}, config, folder, extra)
  for path, leaf in flatten_params(abstract_model(config)[1]).items():
    name, shape = stored_weights[path].name, stored_weights[path].shape(leaf.shape)
    check_weight(tensors[name], name, shape, FAMILIES[config.family].describe_shape(path))
  _check_tied_tables(tensors, config, extra)
  return tensors


def _check_tied_tables(
  tensors: Mapping[str, StoredTensor], config: ModelConfig, extra: Collection[str]
) -> None:
  """Check that the output layer in the files is the embedding's table if both are tied."""
  family = FAMILIES[config.family]
  heads = [weight.name for weight in family.weights if weight.path == 'head/table']
  if not config.tied_embeddings or extra or not heads or heads[0] not in tensors:
    return
  embedding, head = family.find_weight('embed/table').name, heads[0]
  check_weight(tensors[head], head, tensors[embedding].shape, f'the shape of {embedding}')
  with open_weights(tensors[embedding].path) as first, open_weights(tensors[head].path) as second:
    one, other = first.get_slice(embedding), second.get_slice(head)
    rows = max(1, 2**22 // config.d_model)  # compared in blocks, because tables can be large
    for start in range(0, config.vocab_size, rows):
      block = slice(start, min(start + rows, config.vocab_size))
      if not np.array_equal(one[block].astype(np.float32), other[block].astype(np.float32)):
        raise UserError(
          f'{tensors[head].path}: {head} differs from {embedding}, but config.json has '
          'tie_word_embeddings=true, so they are the same. Set it to false if the model was '
          f'trained with both, or remove {head}.'
        )


def save_params(
  folder: str | os.PathLike,
  params: Params,
  config: ModelConfig,
  dtype: str | None = None,
  max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
  """Save parameters as `model.safetensors`, or as numbered shards with an index.

  Each file is written atomically, and the index last. In a run of several processes, every process
  must call this function; process 0 writes.

  Args:
    folder: created if it does not exist.
    params: the model's parameters, on any mesh.
    config: the model's config.
    dtype: dtype of the files; None keeps the dtype of each parameter.
    max_shard_bytes: largest size of a file in bytes; a single weight may exceed it.

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
  dtypes = {path: np.dtype(DTYPES[dtype]) if dtype else x.dtype for path, x in leaves.items()}
  sizes = {path: x.size * dtypes[path].itemsize for path, x in leaves.items()}
  stored = _stored_weights(config)
  shards = _split_shards(sizes, max_shard_bytes)
  weight_map = {}
  for number, paths in enumerate(shards, 1):
    file = SINGLE if len(shards) == 1 else f'model-{number:05d}-of-{len(shards):05d}.safetensors'
    tensors = {}
    for path in paths:
      x = to_host(leaves[path])  # gathers, so every process must take part
      if is_writer:
        tensors[stored[path].name] = stored[path].to_stored(x.astype(dtypes[path]))
    weight_map.update({stored[path].name: file for path in paths})
    if is_writer:
      partial = folder / f'{file}.partial'
      safetensors.numpy.save_file(tensors, partial, metadata={'format': 'pt'})
      partial.chmod(0o644)  # safetensors creates files that only their owner can read
      os.replace(partial, folder / file)
  if is_writer:
    if len(shards) > 1:
      index = {'metadata': {'total_size': sum(sizes.values())}, 'weight_map': weight_map}
      write_json(folder / INDEX, index)
    # Loading would prefer a leftover of an earlier save to the new files.
    (folder / (INDEX if len(shards) == 1 else SINGLE)).unlink(missing_ok=True)


def _stored_weights(config: ModelConfig) -> dict[str, StoredWeight]:
  """Return where each parameter of a model is stored, by its path."""
  family = FAMILIES[config.family]
  return {path: family.find_weight(path) for path in flatten_params(abstract_model(config)[1])}


def _check_names(
  names: set[str],
  needed: set[str],
  config: ModelConfig,
  folder: pathlib.Path,
  extra: Collection[str],
) -> None:
  """Check that the files hold every weight of the model, the extra ones, and no other."""
  needed = needed | set(extra)
  if missing := sorted(needed - names):
    untied = ', which has tie_word_embeddings=false' if 'lm_head.weight' in missing else ''
    raise UserError(
      f'{folder}: weight {missing[0]!r} is missing ({len(missing)} of {len(needed)} are). The '
      f'files must hold every weight of the {config.family} model that config.json describes'
      f'{untied}.'
    )
  unused = sorted(name for name in names - needed if not is_buffer(name))
  if config.tied_embeddings and not extra:
    heads = [w.name for w in FAMILIES[config.family].weights if w.path == 'head/table']
    for name in set(heads) & set(unused):
      log.info('%s: %s is not read, because config.json ties it to the embedding.', folder, name)
      unused.remove(name)
  if unused:
    raise UserError(
      f'{folder}: weight {unused[0]!r} does not belong to the {config.family} model that '
      f'config.json describes ({len(unused)} such weights). Use a complete checkpoint of this '
      'architecture, not an adapter.'
    )


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
