"""Loading parameters from Hugging Face safetensors files, and saving them to such files."""

import functools
import logging
import os
import pathlib
from collections.abc import Collection

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
  check_dtype,
  check_weight,
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
  abstract = abstract_model(config, param_dtype=param_dtype)[1]
  shardings = param_shardings(abstract, mesh)
  files = locate_weights(folder)
  _check_names(set(files), config, folder, extra)
  find_weight = FAMILIES[config.family].find_weight

  def load(path, leaf, sharding):
    stored = find_weight(path_str(path))
    # Reopened for each weight, because what has been read stays in memory until the file is closed.
    with open_weights(files[stored.name]) as file:
      tensor = file.get_slice(stored.name)
      check_weight(tensor, stored.name, stored.shape(leaf.shape), folder)

      @functools.cache  # reads a shard once for all its replicas
      def read(starts, stops):
        return stored.read_block(tensor, leaf.shape, starts, stops).astype(leaf.dtype)

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
  files = locate_weights(folder)
  if name not in files:
    raise UserError(f'{folder}: weight {name!r} is missing.')
  with open_weights(files[name]) as file:
    check_weight(file.get_slice(name), name, shape, folder)
    return file.get_tensor(name).astype(np.float32)


def stored_dtype(folder: str | os.PathLike, config: ModelConfig) -> str:
  """Return the dtype in which the files hold the embedding, such as 'bfloat16'.

  Args:
    folder: the model's folder.
    config: the model's config.

  Raises:
    UserError: if the files are damaged, or the embedding is missing or has an unsupported dtype.
  """
  folder = pathlib.Path(folder)
  stored, shape = _stored_weights(config)['embed/table'], (config.vocab_size, config.d_model)
  files = locate_weights(folder)
  _check_names(set(files), config, folder)
  with open_weights(files[stored.name]) as file:
    tensor = file.get_slice(stored.name)
    check_weight(tensor, stored.name, stored.shape(shape), folder)
    return dict(zip(STORED_DTYPES, DTYPES, strict=True))[tensor.get_dtype()]


def check_params(folder: str | os.PathLike, config: ModelConfig) -> None:
  """Check the names, shapes and dtypes of a folder's weights without reading their values.

  Args:
    folder: the model's folder.
    config: the model's config.

  Raises:
    UserError: as `load_params`.
  """
  folder = pathlib.Path(folder)
  files = locate_weights(folder)
  _check_names(set(files), config, folder)
  stored_weights = _stored_weights(config)
  for path, leaf in flatten_params(abstract_model(config)[1]).items():
    stored = stored_weights[path]
    with open_weights(files[stored.name]) as file:
      check_weight(file.get_slice(stored.name), stored.name, stored.shape(leaf.shape), folder)


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
  names: set[str], config: ModelConfig, folder: pathlib.Path, extra: Collection[str] = ()
) -> None:
  """Check that the files hold every weight of the model, the extra ones, and no other."""
  needed = {stored.name for stored in _stored_weights(config).values()} | set(extra)
  if missing := sorted(needed - names):
    raise UserError(
      f'{folder}: weight {missing[0]!r} is missing ({len(missing)} of {len(needed)} are). The '
      f'files must hold every weight of the {config.family} model that config.json describes.'
    )
  unused = sorted(n for n in names - needed if not n.endswith('rotary_emb.inv_freq'))
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
