"""The safetensors files of a model folder: find and open them, and check their tensors."""

import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import read_json

DTYPES = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16, 'float16': np.float16}
STORED_DTYPES = ('F32', 'BF16', 'F16')  # safetensors' names for the same
SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
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


def list_weight_files(folder: pathlib.Path) -> list[str]:
  """Return the names of a folder's safetensors files, sorted.

  Raises:
    UserError: if there are none, or if the index is broken.
  """
  if (folder / SINGLE).exists():
    return [SINGLE]
  if (folder / INDEX).exists():
    weight_map = read_json(folder / INDEX).get('weight_map')
    if not isinstance(weight_map, dict) or not weight_map:
      raise UserError(
        f'{folder / INDEX} has no weight_map from weight names to files. Download it again.'
      )
    files = sorted(set(weight_map.values()))
    if missing := [f for f in files if pathlib.Path(f).name != f or not (folder / f).exists()]:
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


def open_weights(path: pathlib.Path) -> Any:
  """Return an open safetensors file, which is a context manager.

  Args:
    path: the file.

  Raises:
    UserError: if the file is damaged.
  """
  try:
    return safetensors.safe_open(path, framework='numpy')
  except safetensors.SafetensorError as error:
    raise UserError(
      f'{path} is not a readable safetensors file ({error}). Download it again.'
    ) from error


def locate_weights(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Return the file of each tensor in a folder, by the tensor's name.

  Args:
    folder: the model's folder.

  Raises:
    UserError: if there are no safetensors files, one is damaged, or a tensor is in two of them.
  """
  files: dict[str, pathlib.Path] = {}
  for file in list_weight_files(folder):
    with open_weights(folder / file) as opened:
      for name in opened.keys():
        if name in files:
          raise UserError(
            f'{folder}: weight {name!r} is in both {files[name].name} and {file}. Delete the file '
            'that does not belong to the model.'
          )
        files[name] = folder / file
  return files


def check_weight(weight: Any, name: str, shape: tuple[int, ...], folder: pathlib.Path) -> None:
  """Check the shape and dtype of a tensor in a file without reading its values.

  Args:
    weight: a slice object of safetensors.
    name: the tensor's name, for the message.
    shape: the shape that config.json implies.
    folder: the model's folder, for the message.

  Raises:
    UserError: if the shape differs, or the dtype is not supported.
  """
  if (stored := tuple(weight.get_shape())) != shape:
    raise UserError(
      f'{folder}: weight {name!r} has shape {stored}, but config.json implies {shape}.'
    )
  if weight.get_dtype() not in STORED_DTYPES:
    raise UserError(
      f'{folder}: weight {name!r} is {weight.get_dtype()}, but only {", ".join(STORED_DTYPES)} are '
      'supported. If the checkpoint is quantized, use the original.'
    )
