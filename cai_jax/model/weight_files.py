"""The safetensors files of a model folder: find and open them, and check their tensors."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from cai_jax.runtime.errors import UserError, show
from cai_jax.runtime.files import parse_json, read_json

DTYPES = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16, 'float16': np.float16}
STORED_DTYPES = ('F32', 'BF16', 'F16')  # safetensors' names for the same
SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
ADAPTER = 'adapter_config.json'  # of peft; transformers would apply it to the weights
PICKLES = ('*.bin', '*.pt', '*.pth', '*.ckpt')


def check_dtype(dtype: str, name: str) -> None:
  """Check that a dtype of parameters is supported.

  Args:
    dtype: such as 'bfloat16'.
    name: name of the argument or setting, for the message.

  Raises:
    UserError: if it is not.
  """
  if dtype not in DTYPES:
    raise UserError(f'{name}={dtype!r} is not supported. Choose one of {", ".join(DTYPES)}.')


class StoredTensor(NamedTuple):
  """What the header of a safetensors file says of a tensor.

  Attributes:
    name: the tensor's name in the file.
    path: the file.
    shape: the tensor's shape.
    dtype: safetensors' name of its dtype, such as 'BF16'; 'MXFP4' for a tensor in two parts.
    parts: the tensors that it is stored in; () if it is stored as it is.
  """

  name: str
  path: pathlib.Path
  shape: tuple[int, ...]
  dtype: str
  parts: tuple['StoredTensor', ...] = ()


def list_weight_files(folder: pathlib.Path) -> list[str]:
  """Return the names of a folder's safetensors files, sorted.

  Raises:
    UserError: if there are none, if the index is broken, if there are two sets of weights, or an
      adapter.
  """
  if (folder / ADAPTER).exists():
    raise UserError(
      f'{folder} holds an adapter ({ADAPTER}), which is not read. Merge it into its model with '
      'merge_and_unload() and save that, or delete the files of the adapter.'
    )
  weight_map = _read_index(folder) if (folder / INDEX).exists() else {}
  files, present = sorted(set(weight_map.values())), {f.name for f in folder.iterdir()}
  if SINGLE in present:
    if others := [f for f in files if f != SINGLE and f in present]:
      raise UserError(
        f'{folder} has both {SINGLE} and {others[0]}, which {INDEX} names. Delete the weights that '
        'do not belong to the model.'
      )
    return [SINGLE]
  if files:
    if missing := [f for f in files if f not in present]:
      raise UserError(
        f'{folder / INDEX} names {missing[0]!r}, which is not in the folder. Download the missing '
        'files.'
      )
    return files
  pickles = sorted(f.name for pattern in PICKLES for f in folder.glob(pattern))
  if pickles:
    raise UserError(
      f'{folder} stores its weights as the pickle {pickles[0]}, and loading a pickle can run any '
      'code. Use a safetensors version of the checkpoint. If you trust the pickle, load it with '
      'transformers and call save_pretrained(folder).'
    )
  raise UserError(
    f'{folder} has neither {SINGLE} nor {INDEX}. cai_jax reads only safetensors files, '
    'because loading a pickle (.bin, .pt) can run any code.'
  )


def _read_index(folder: pathlib.Path) -> dict[str, str]:
  """Return the file of each tensor, by the tensor's name, as the index states it."""
  weight_map = read_json(folder / INDEX).get('weight_map')
  if not isinstance(weight_map, dict) or not weight_map:
    raise UserError(
      f'{folder / INDEX} has no weight_map from weight names to files. Download it again.'
    )
  for name, file in weight_map.items():
    is_name = isinstance(file, str) and pathlib.PurePath(file).name == file
    if not is_name or not file.endswith('.safetensors'):
      raise UserError(
        f'{folder / INDEX}: weight_map has {show(file)} for {name!r}; it must be the name of a '
        'safetensors file in the same folder.'
      )
  return weight_map


def open_weights(path: pathlib.Path) -> Any:
  """Return an open safetensors file, which is a context manager.

  Args:
    path: the file.

  Raises:
    UserError: if the file is damaged.
  """
  try:
    return safetensors.safe_open(path, framework='numpy')
  except (safetensors.SafetensorError, OSError) as error:
    raise UserError(
      f'{path} is not a readable safetensors file ({error}). Download it again.'
    ) from error


def locate_weights(folder: pathlib.Path) -> dict[str, StoredTensor]:
  """Return what the files of a folder hold, by the tensor's name.

  Args:
    folder: the model's folder.

  Raises:
    UserError: if there are no safetensors files, one is damaged, a tensor is in two of them, or a
      tensor is not where the index says.
  """
  tensors: dict[str, StoredTensor] = {}
  files = list_weight_files(folder)
  for file in files:
    with open_weights(folder / file) as opened:
      _check_header(folder / file)
      for name in opened.keys():
        if name in tensors:
          raise UserError(
            f'{folder}: weight {name!r} is in both {tensors[name].path.name} and {file}. Delete '
            'the file that does not belong to the model.'
          )
        view = opened.get_slice(name)
        tensors[name] = StoredTensor(name, folder / file, tuple(view.get_shape()), view.get_dtype())
  if files != [SINGLE]:
    _check_index(folder, tensors)
  return tensors


def _check_header(path: pathlib.Path) -> None:
  """Check that the header of a readable file describes each tensor once."""
  with open(path, 'rb') as file:
    size = int.from_bytes(file.read(8), 'little')
    try:
      parse_json(file.read(size))
    except ValueError as error:
      raise UserError(f'{path}: in the header, {error}. Download the file again.') from error


def _check_index(folder: pathlib.Path, tensors: Mapping[str, StoredTensor]) -> None:
  """Check that each tensor of the index is in the file that the index names."""
  for name, file in _read_index(folder).items():
    if name in tensors and tensors[name].path.name != file:
      raise UserError(
        f'{folder / INDEX} says that {name!r} is in {file}, but it is in '
        f'{tensors[name].path.name}. Download the files again.'
      )
    if name not in tensors and not is_buffer(name):
      raise UserError(
        f'{folder / INDEX} says that {name!r} is in {file}, but that file has no such weight. '
        'Download the files again.'
      )


def is_buffer(name: str) -> bool:
  """Whether a tensor is a table of rotary frequencies, which old checkpoints contain."""
  return name.endswith('rotary_emb.inv_freq')


def check_weight(tensor: StoredTensor, name: str, shape: tuple[int, ...], fields: str = '') -> None:
  """Check the shape and dtype of a tensor.

  Args:
    tensor: what the file says of it.
    name: the tensor's name, for the message.
    shape: the shape that config.json implies.
    fields: the fields of config.json that imply it, for the message.

  Raises:
    UserError: if the shape differs, or the dtype is not supported.
  """
  if tensor.shape != shape:
    raise UserError(
      f'{tensor.path}: weight {name!r} has shape {tensor.shape}, but config.json implies '
      f'{shape}{fields and f" ({fields})"}. Use the config.json and the weights of one model.'
    )
  if tensor.dtype not in STORED_DTYPES and not tensor.parts:
    raise UserError(
      f'{tensor.path}: weight {name!r} is {tensor.dtype}, but only {", ".join(STORED_DTYPES)} are '
      'supported. If the checkpoint is quantized, use the original.'
    )


def check_finite(values: np.ndarray, name: str, path: pathlib.Path) -> None:
  """Check that a weight has no NaN and no infinite value.

  Args:
    values: a block of the weight, in the dtype of the model.
    name: the tensor's name, for the message.
    path: its file, for the message.

  Raises:
    UserError: if it has one.
  """
  if not np.isfinite(values).all():
    raise UserError(
      f'{path}: weight {name!r} has a NaN or infinite value as {values.dtype}. Download the file '
      'again; if it is what was trained, use an earlier checkpoint or a wider dtype.'
    )
