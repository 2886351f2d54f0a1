"""Parameters in and out of Hugging Face safetensors files, through one table."""

import functools
import json
import logging
import math
import os
import pathlib
import re
from collections.abc import Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from cai_jax.model.config import ModelConfig
from cai_jax.model.sharding import param_shardings, path_str
from cai_jax.model.transformer import Transformer
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import write_json

Params = dict[str, Any]  # nested dict of arrays; layers stand under integer keys

# (our path, Hugging Face name, our axes -> theirs); `{}` is the layer. Letters are the legend of
# transformer.py; letters that stand together on the right are merged into one axis, in that order.
TABLE = (
  ('embed/table', 'model.embed_tokens.weight', 'VD->V,D'),
  ('head/table', 'lm_head.weight', 'VD->V,D'),
  ('norm/scale', 'model.norm.weight', 'D->D'),
  ('layers/{}/attention_norm/scale', 'model.layers.{}.input_layernorm.weight', 'D->D'),
  ('layers/{}/mlp_norm/scale', 'model.layers.{}.post_attention_layernorm.weight', 'D->D'),
  ('layers/{}/attention/query/kernel', 'model.layers.{}.self_attn.q_proj.weight', 'DNH->NH,D'),
  ('layers/{}/attention/query/bias', 'model.layers.{}.self_attn.q_proj.bias', 'NH->NH'),
  ('layers/{}/attention/key/kernel', 'model.layers.{}.self_attn.k_proj.weight', 'DKH->KH,D'),
  ('layers/{}/attention/key/bias', 'model.layers.{}.self_attn.k_proj.bias', 'KH->KH'),
  ('layers/{}/attention/value/kernel', 'model.layers.{}.self_attn.v_proj.weight', 'DKH->KH,D'),
  ('layers/{}/attention/value/bias', 'model.layers.{}.self_attn.v_proj.bias', 'KH->KH'),
  ('layers/{}/attention/output/kernel', 'model.layers.{}.self_attn.o_proj.weight', 'NHD->D,NH'),
  ('layers/{}/attention/output/bias', 'model.layers.{}.self_attn.o_proj.bias', 'D->D'),
  ('layers/{}/attention/q_norm/scale', 'model.layers.{}.self_attn.q_norm.weight', 'H->H'),
  ('layers/{}/attention/k_norm/scale', 'model.layers.{}.self_attn.k_norm.weight', 'H->H'),
  ('layers/{}/mlp/gate/kernel', 'model.layers.{}.mlp.gate_proj.weight', 'DF->F,D'),
  ('layers/{}/mlp/up/kernel', 'model.layers.{}.mlp.up_proj.weight', 'DF->F,D'),
  ('layers/{}/mlp/down/kernel', 'model.layers.{}.mlp.down_proj.weight', 'FD->D,F'),
)
DTYPES = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16, 'float16': np.float16}
FILE_DTYPES = ('F32', 'BF16', 'F16')  # as safetensors writes them
SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
PICKLES = ('*.bin', '*.pt', '*.pth', '*.ckpt')

log = logging.getLogger(__name__)


@functools.lru_cache
def structure(
  config: ModelConfig, dtype: str = 'float32', param_dtype: str = 'float32'
) -> tuple[nnx.GraphDef, Params]:
  """The graph of a Transformer and its parameters as ShapeDtypeStructs; nothing is allocated.

  `nnx.merge(graph, params)` inside a jitted function gives the model back.
  """
  model = nnx.eval_shape(
    lambda: Transformer(config, nnx.Rngs(0), jnp.dtype(dtype), jnp.dtype(param_dtype))
  )
  graph, state = nnx.split(model)
  return graph, nnx.to_pure_dict(state)


def check_dtype(dtype: str, name: str) -> None:
  """ValueError unless `dtype` is one that parameters can have; `name` is the argument's."""
  if dtype not in DTYPES:
    raise UserError(f'{name}={dtype!r} is not supported; one of {tuple(DTYPES)} is.')


def hf_name(path: str) -> str:
  """Hugging Face's name of the parameter at our path, such as 'layers/0/mlp/up/kernel'.

  Raises:
    ValueError: if the table has no such parameter.
  """
  return _entry(path)[0]


def hf_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Shape of the parameter at `path` in a Hugging Face file, where ours is `shape`."""
  return tuple(math.prod(shape[i] for i in group) for group in _entry(path)[1])


def to_hf_layout(path: str, x: np.ndarray) -> np.ndarray:
  """Our parameter at `path` in Hugging Face's layout, contiguous in memory."""
  order = [i for group in _entry(path)[1] for i in group]
  # safetensors writes a strided array's buffer as it lies: the copy is what makes it right.
  return np.ascontiguousarray(x.transpose(order).reshape(hf_shape(path, x.shape)))


def load_params(
  folder: str | os.PathLike,
  config: ModelConfig,
  mesh: Mesh,
  param_dtype: str = 'float32',
  others: Collection[str] = (),
) -> Params:
  """Parameters of a Hugging Face folder, each read straight into its shards on `mesh`.

  Args:
    folder: holds `model.safetensors`, or `model.safetensors.index.json` and its shards.
    config: the model's.
    mesh: where the parameters go, as `RULES` says.
    param_dtype: of the result: 'float32', 'bfloat16' or 'float16', whatever the files hold.
    others: weights that the files must hold beside the model's, for `load_weight` to read.

  Raises:
    ValueError: for a weight that is missing, unused or of another shape or type, naming it; for an
      unreadable file; for a folder with nothing but pickled weights.
  """
  check_dtype(param_dtype, 'param_dtype')
  folder = pathlib.Path(folder)
  abstract = structure(config, param_dtype=param_dtype)[1]
  shardings = param_shardings(abstract, mesh)
  holders = _holders(folder)
  _check_names(holders, abstract, config, folder, others)

  def load(path, leaf, sharding):
    path = path_str(path)
    # Opened for each weight: what has been read of a file stays in memory until it is closed.
    with _open(holders[hf_name(path)]) as file:
      weight = file.get_slice(hf_name(path))
      _check_weight(weight, hf_name(path), hf_shape(path, leaf.shape), folder)

      @functools.cache  # replicas of a shard are read once
      def read(starts, stops):
        return _read(weight, path, leaf.shape, starts, stops).astype(leaf.dtype)

      def shard(index):
        ranges = [s.indices(size) for s, size in zip(index, leaf.shape, strict=True)]
        return read(tuple(r[0] for r in ranges), tuple(r[1] for r in ranges))

      return jax.make_array_from_callback(leaf.shape, sharding, shard)

  return jax.tree_util.tree_map_with_path(load, abstract, shardings)


def load_weight(folder: str | os.PathLike, name: str, shape: tuple[int, ...]) -> np.ndarray:
  """One weight f32[*shape] of a Hugging Face folder, by its name there, such as 'score.weight'.

  Raises:
    ValueError: if it is missing, or of another shape or type; for an unreadable file.
  """
  folder = pathlib.Path(folder)
  holders = _holders(folder)
  if name not in holders:
    raise UserError(f'{folder}: weight {name!r} is missing.')
  with _open(holders[name]) as file:
    _check_weight(file.get_slice(name), name, shape, folder)
    return file.get_tensor(name).astype(np.float32)


def check_params(folder: str | os.PathLike, config: ModelConfig) -> None:
  """Checks the names, shapes and types of a folder's weights; none of them is read.

  Raises:
    ValueError: as `load_params`.
  """
  folder = pathlib.Path(folder)
  abstract = structure(config)[1]
  holders = _holders(folder)
  _check_names(holders, abstract, config, folder)
  for path, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]:
    name = path_str(path)
    with _open(holders[hf_name(name)]) as file:
      weight = file.get_slice(hf_name(name))
      _check_weight(weight, hf_name(name), hf_shape(name, leaf.shape), folder)


def save_params(
  folder: str | os.PathLike,
  params: Params,
  config: ModelConfig,
  dtype: str | None = None,
  max_shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes parameters as `model.safetensors`, or as numbered shards with an index.

  Each file appears whole or not at all, the index last. Every process of a multi-process run
  calls it; process 0 writes.

  Args:
    folder: made if absent.
    params: the model's parameters, on any mesh.
    config: the model's.
    dtype: of the files; None keeps each parameter's.
    max_shard_bytes: size from which a further file is begun; a larger weight has its own.

  Raises:
    ValueError: if `params` are not those of `config`, or for an unknown dtype.
  """
  if dtype is not None:
    check_dtype(dtype, 'dtype')
  leaves = dict(_flat(params))
  expected = {path: leaf.shape for path, leaf in _flat(structure(config)[1])}
  if (given := {path: leaf.shape for path, leaf in leaves.items()}) != expected:
    differ = sorted(p for p in given.keys() | expected if given.get(p) != expected.get(p))
    raise UserError(
      f'params do not fit the config at {differ[0]}: {given.get(differ[0])} was given, '
      f'{expected.get(differ[0])} is needed ({len(differ)} such).'
    )
  folder = pathlib.Path(folder)
  writer = jax.process_index() == 0
  if writer:
    folder.mkdir(parents=True, exist_ok=True)
  item = {path: np.dtype(DTYPES[dtype]) if dtype else leaf.dtype for path, leaf in leaves.items()}
  shards = _shards({p: x.size * item[p].itemsize for p, x in leaves.items()}, max_shard_bytes)
  weight_map = {}
  for number, paths in enumerate(shards, 1):
    file = SINGLE if len(shards) == 1 else f'model-{number:05d}-of-{len(shards):05d}.safetensors'
    tensors = {}
    for path in paths:
      x = to_host(leaves[path])  # a gather: all processes take part
      if writer:
        tensors[hf_name(path)] = to_hf_layout(path, x.astype(item[path]))
    weight_map.update({hf_name(path): file for path in paths})
    if writer:
      partial = folder / f'{file}.partial'
      safetensors.numpy.save_file(tensors, partial, metadata={'format': 'pt'})
      partial.chmod(0o644)  # safetensors makes files that nobody else may read
      os.replace(partial, folder / file)
  if writer and len(shards) > 1:
    total = sum(x.size * item[path].itemsize for path, x in leaves.items())
    index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
    write_json(folder / INDEX, index)
  if writer:  # what an earlier save left would be read in place of this one
    (folder / (INDEX if len(shards) == 1 else SINGLE)).unlink(missing_ok=True)


def to_host(x: jax.Array) -> np.ndarray:
  """The whole of an array as numpy, gathered where its shards lie on several processes."""
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    return multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x)


def weight_files(folder: pathlib.Path) -> list[str]:
  """Names of the safetensors files of a model folder, in order.

  Raises:
    ValueError: if there are none, saying why pickled ones are not read; if the index is broken.
  """
  if (folder / SINGLE).exists():
    return [SINGLE]
  if (folder / INDEX).exists():
    weight_map = read_json(folder / INDEX).get('weight_map')
    if not isinstance(weight_map, dict) or not weight_map:
      raise UserError(f'{folder / INDEX}: no weight_map from weight names to files.')
    files = sorted(set(weight_map.values()))
    if absent := [f for f in files if pathlib.Path(f).name != f or not (folder / f).exists()]:
      raise UserError(f'{folder / INDEX} names {absent[0]!r}, which is not in the folder.')
    return files
  pickles = sorted(f.name for pattern in PICKLES for f in folder.glob(pattern))
  if pickles:
    raise UserError(
      f'{folder} holds its weights as {pickles[0]}, a pickle: reading one can run any code that '
      'its author put there, so cai_jax does not. Use a safetensors version of the checkpoint, or '
      'convert it where you trust it: load it with transformers and call save_pretrained(folder).'
    )
  raise UserError(
    f'{folder} has neither {SINGLE} nor {INDEX}. Weights are read from safetensors alone: pickles '
    '(.bin, .pt) can run any code and are neither fetched nor read.'
  )


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The object in a JSON file. ValueError, with the path, if it holds no object."""
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:  # not UTF-8, or not JSON
    raise UserError(f'{path} is not JSON: {error}') from error
  if not isinstance(value, dict):
    raise UserError(f'{path} holds {type(value).__name__}, not a JSON object.')
  return value


@functools.cache
def _entry(path: str) -> tuple[str, tuple[tuple[int, ...], ...]]:
  """(Hugging Face name, their axes as groups of ours) of our path."""
  layer = re.match(r'layers/(\d+)/', path)
  general = path if layer is None else f'layers/{{}}/{path[layer.end() :]}'
  matches = [(name, axes) for ours, name, axes in TABLE if ours == general]
  if not matches:
    raise UserError(f'weights.TABLE has no entry for parameter {path!r}.')
  name, axes = matches[0]
  ours, theirs = axes.split('->')
  groups = tuple(tuple(ours.index(letter) for letter in group) for group in theirs.split(','))
  return name.format(layer[1]) if layer else name, groups


def _flat(params: Params) -> Iterator[tuple[str, Any]]:
  for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
    yield path_str(path), leaf


def _open(path: pathlib.Path):
  try:
    return safetensors.safe_open(path, framework='numpy')
  except safetensors.SafetensorError as error:
    raise UserError(
      f'{path} is not a readable safetensors file ({error}); was its download cut short?'
    ) from error


def _holders(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """The file that holds each weight."""
  holders: dict[str, pathlib.Path] = {}
  for file in weight_files(folder):
    with _open(folder / file) as opened:
      for name in opened.keys():
        if name in holders:
          raise UserError(f'{folder}: weight {name!r} is in both {holders[name].name} and {file}.')
        holders[name] = folder / file
  return holders


def _check_names(
  holders,
  abstract: Params,
  config: ModelConfig,
  folder: pathlib.Path,
  others: Collection[str] = (),
) -> None:
  needed = {hf_name(path) for path, _ in _flat(abstract)} | set(others)
  if missing := sorted(needed - holders.keys()):
    raise UserError(
      f'{folder}: weight {missing[0]!r} is missing ({len(missing)} of {len(needed)} are). The '
      f'files must hold every weight of a {config.family} model as its config.json describes it.'
    )
  unused = sorted(n for n in holders.keys() - needed if not n.endswith('rotary_emb.inv_freq'))
  if config.tied_embeddings and not others and 'lm_head.weight' in unused:
    log.info('%s: lm_head.weight is not read: the config ties it to the embedding.', folder)
    unused.remove('lm_head.weight')
  if unused:
    raise UserError(
      f'{folder}: weight {unused[0]!r} has no place in a {config.family} model as config.json '
      f'describes it ({len(unused)} such weights). Is it another architecture, or an adapter?'
    )


def _check_weight(weight, name: str, shape: tuple[int, ...], folder: pathlib.Path) -> None:
  if (found := tuple(weight.get_shape())) != shape:
    raise UserError(f'{folder}: weight {name!r} has shape {found}; config.json asks for {shape}.')
  if weight.get_dtype() not in FILE_DTYPES:
    raise UserError(
      f'{folder}: weight {name!r} is {weight.get_dtype()}; {FILE_DTYPES} can be read. '
      'Quantised checkpoints are not supported: use the original.'
    )


def _read(weight, path: str, shape, starts, stops) -> np.ndarray:
  """The block [starts, stops) of our parameter, reading no more rows than it needs.

  Of axes that are merged in the file, the first is sliced there and the others in memory.
  """
  groups = _entry(path)[1]
  region, block, within = [], [], []
  for first, *rest in groups:
    row = math.prod(shape[i] for i in rest)
    region.append(slice(starts[first] * row, stops[first] * row))
    block += [stops[first] - starts[first], *(shape[i] for i in rest)]
    within += [slice(None), *(slice(starts[i], stops[i]) for i in rest)]
  order = [i for group in groups for i in group]
  return weight[tuple(region)].reshape(block)[tuple(within)].transpose(np.argsort(order))


def _shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
  """Names in order, cut where a shard would pass `limit` bytes."""
  shards, filled = [[]], 0
  for name, size in sizes.items():
    if shards[-1] and filled + size > limit:
      shards.append([])
      filled = 0
    shards[-1].append(name)
    filled += size
  return shards
