"""Writing a model as a Hugging Face folder: weights, tokenizer and configs."""

import os
import pathlib
import shutil
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax

from cai_jax.model.checkpoint import MAX_SHARD_BYTES, save_params
from cai_jax.model.config import ModelConfig
from cai_jax.model.folder import MODEL_FILES
from cai_jax.model.generation_config import FILE as GENERATION_CONFIG
from cai_jax.model.transformer import Params
from cai_jax.runtime import processes
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import read_json, write_json


def save_folder(
  path: str | os.PathLike,
  params: Params,
  config: ModelConfig,
  tokenizer: Any,
  entries: Mapping[str, Any],
  *,
  generation_config: Mapping[str, Any] | None = None,
  extra: Mapping[str, Any] = MappingProxyType({}),
  dtype: str | None = None,
  max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
  """Save a model as a folder that transformers reads, in place of an earlier model there.

  Other files of the folder are kept. config.json is written last, so that an interrupted save does
  not look like a model. In a run of several processes, every process must call this function;
  process 0 writes.

  Args:
    path: the folder, created if it does not exist.
    params: the parameters that the family's weight table names.
    config: the model's config.
    tokenizer: its tokenizer.
    entries: config.json, without the dtype.
    generation_config: generation_config.json; None writes no such file.
    extra: further tensors by their names in the files.
    dtype: dtype of the weights; None keeps that of the parameters.
    max_shard_bytes: largest size of a safetensors file in bytes; a single weight may exceed it.

  Raises:
    UserError: if the dtype is unknown, or `path` is a file.
  """
  folder = pathlib.Path(path).expanduser()
  if folder.exists() and not folder.is_dir():
    raise UserError(f'{folder} is a file. Give the path of a folder.')
  partial = folder / '.partial'
  if jax.process_index() == 0:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
  save_params(partial, params, config, dtype, max_shard_bytes, extra)
  if jax.process_index() == 0:
    _write_tokenizer(partial, tokenizer)
    stored = dtype or str(jax.tree.leaves(params)[0].dtype)
    # transformers before 4.56 reads `torch_dtype`.
    write_json(partial / 'config.json', {**entries, 'dtype': stored, 'torch_dtype': stored})
    if generation_config is not None:
      write_json(partial / GENERATION_CONFIG, generation_config)
    _replace_model(folder, partial)
  processes.barrier('save a model')


def _write_tokenizer(folder: pathlib.Path, tokenizer: Any) -> None:
  """Write the files of a tokenizer so that transformers 4 and 5 read the same tokenizer."""
  tokenizer.save_pretrained(folder)
  path = folder / 'tokenizer_config.json'
  settings = read_json(path)
  for name in ('is_local', 'local_files_only'):  # how this process found it
    settings.pop(name, None)
  # tokenizer.json is complete. The classes of single models would rebuild parts of it.
  settings['tokenizer_class'] = 'PreTrainedTokenizerFast'
  # Otherwise transformers 4 adds token_type_ids, which these models do not take.
  settings['model_input_names'] = ['input_ids', 'attention_mask']
  if isinstance(extra := settings.get('extra_special_tokens'), list):
    # transformers 5 reads this older name too, and transformers 4 expects an object for the newer.
    settings['additional_special_tokens'] = extra
    del settings['extra_special_tokens']
  write_json(path, settings)


def _replace_model(folder: pathlib.Path, partial: pathlib.Path) -> None:
  """Replace the model in `folder` by the files of `partial`, config.json last."""
  (folder / 'config.json').unlink(missing_ok=True)
  for stale in {f for pattern in MODEL_FILES for f in folder.glob(pattern)}:
    stale.unlink()
  names = sorted(f.name for f in partial.iterdir())
  for name in [n for n in names if n != 'config.json'] + ['config.json']:
    if (folder / name).is_dir():
      shutil.rmtree(folder / name)
    os.replace(partial / name, folder / name)
  partial.rmdir()
