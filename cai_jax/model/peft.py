"""Adapters in the format of PEFT: adapter_config.json and adapter_model.safetensors.

PEFT names the tensors A [r,I] and B [O,r] of a layer after the layer's module in transformers, such
as 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight', and multiplies B · A by
lora_alpha / r, or by lora_alpha / r^1/2 with use_rslora (peft 0.21.2, `tuners/lora/layer.py` and
`utils/save_and_load.py`). The weight table of the model's family gives the names.

A layer needs a tensor of its own. Where a checkpoint joins layers, as Phi 3 joins query, key and
value, an adapter of PEFT reads all of them with one A, which ours do not share.
"""

import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from cai_jax.model import lora as lora_lib
from cai_jax.model.checkpoint_checks import stored_weights
from cai_jax.model.config import ModelConfig
from cai_jax.model.families.family import FAMILIES
from cai_jax.model.families.weight_table import StoredWeight
from cai_jax.model.lora import LoraConfig
from cai_jax.model.sharding import flatten_params, path_str
from cai_jax.model.transformer import Params
from cai_jax.model.weight_files import ADAPTER as CONFIG
from cai_jax.model.weight_files import STORED_DTYPES, check_finite, open_weights
from cai_jax.runtime.errors import UserError, show
from cai_jax.runtime.files import make_folder, read_json, replacing, write_json
from cai_jax.runtime.mesh import to_host

WEIGHTS = 'adapter_model.safetensors'
FILES = (CONFIG, WEIGHTS)
_TENSOR = re.compile(r'base_model\.model\.(.+)\.lora_([AB])\.weight')

# Options of adapter_config.json that do not change what an adapter adds to its model.
_HARMLESS = {
  *('auto_mapping', 'base_model_name_or_path', 'revision', 'task_type', 'inference_mode'),
  *('peft_version', 'lora_dropout', 'megatron_config', 'megatron_core', 'runtime_config'),
  # Which layers have an adapter is read from the names of the tensors.
  *('target_modules', 'exclude_modules', 'layers_to_transform', 'layers_pattern'),
  *('qalora_group_size', 'loftq_config', 'eva_config'),
}
_READ = {'peft_type', 'r', 'lora_alpha', 'use_rslora', 'bias', 'init_lora_weights'}
# Ways to draw A and B. Others, such as 'pissa', change the base model as well.
_PLAIN_INITS = (True, False, None, 'gaussian', 'orthogonal', 'eva')


def check_export(model: ModelConfig, lora: LoraConfig, section: str) -> None:
  """Check that adapters of a model have a form in PEFT.

  Args:
    model: the shape of the model.
    lora: the settings of the adapters.
    section: the section of the config, for the message.

  Raises:
    UserError: if they do not.
  """
  try:
    _find_modules(model, lora)
  except UserError as error:
    raise UserError(f'{section}.lora_export: {error}') from None


def write_adapters(
  folder: str | os.PathLike, adapters: Params, model: ModelConfig, lora: LoraConfig, base: str
) -> None:
  """Write adapters as a folder that PEFT reads.

  In a run of several processes, every process must call this function; process 0 writes.

  Args:
    folder: created if it does not exist.
    adapters: the adapters, in the structure that `lora.init` returns.
    model: the shape of the model.
    lora: the settings that the adapters were made with.
    base: name of the model that they belong to.

  Raises:
    UserError: if the adapters have no form in PEFT.
  """
  modules = _find_modules(model, lora)
  # Gathers, so every process must take part.
  leaves = {path: to_host(x) for path, x in flatten_params(adapters).items()}
  if jax.process_index() != 0:
    return
  tensors = {
    f'base_model.model.{module}.lora_{part.upper()}.weight': np.ascontiguousarray(
      leaves[f'{path}/adapter/{part}'].T, np.float32
    )
    for path, module in modules.items()
    for part in 'ab'
  }
  folder = make_folder(folder)
  (folder / CONFIG).unlink(missing_ok=True)  # an interrupted save does not look like an adapter
  with replacing(folder / WEIGHTS) as partial:
    safetensors.numpy.save_file(tensors, partial, metadata={'format': 'pt'})
    partial.chmod(0o644)
  write_json(folder / CONFIG, _describe(model, modules, lora, base))


def read_adapters(
  folder: str | os.PathLike, model: ModelConfig, lora: LoraConfig, section: str = 'train'
) -> Params:
  """Read the adapters of a folder in PEFT's format.

  Args:
    folder: the folder.
    model: the shape of the model.
    lora: the settings that the adapters must have.
    section: the section of the config that `lora` is from, for messages.

  Returns:
    The adapters in the structure of `lora.init`, f32 in the memory of the host.

  Raises:
    UserError: if a file is missing or damaged, the adapters are of another kind or belong to
      another model, or their rank, scale or layers are not those of `lora`.
  """
  folder = pathlib.Path(folder)
  where = f'{section}.lora_init={str(folder)!r}'
  for name in FILES:
    if not (folder / name).is_file():
      raise UserError(f"{where} has no {name}. Give a folder of an adapter in PEFT's format.")
  _check_config(read_json(folder / CONFIG), lora, where, section)
  modules = {name: path for path, name in _find_modules(model, lora).items()}
  family, arrays = FAMILIES[model.family], {}
  with open_weights(folder / WEIGHTS) as file:
    for name in file.keys():
      found = _TENSOR.fullmatch(name)
      module = found and family.canonical_name(f'{found[1]}.weight').removesuffix('.weight')
      if found is None or module not in modules:
        raise UserError(
          f'{where} has the tensor {name!r}, which is no adapter of a layer that '
          f'{section}.lora_modules={lora.modules!r} matches. Set it to match the layers of the '
          'adapter.'
        )
      if file.get_slice(name).get_dtype() not in STORED_DTYPES:
        raise UserError(f'{where}: {name!r} must have one of the dtypes {STORED_DTYPES}.')
      value = file.get_tensor(name).astype(np.float32)
      check_finite(value, name, folder / WEIGHTS)
      arrays[f'{modules[module]}/adapter/{found[2].lower()}'] = value.T
  shapes = lora_lib.split(lora_lib.abstract_model(model, lora)[1])[0]

  def take(path: Any, leaf: Any) -> np.ndarray:
    name = path_str(path)
    if name not in arrays or arrays[name].shape != leaf.shape:
      has = arrays[name].shape[::-1] if name in arrays else 'no tensor'
      raise UserError(
        f'{where} has {has} for {name}, and shape {leaf.shape[::-1]} is needed. Use an adapter of '
        f'this model, and set {section}.lora_modules to match its layers.'
      )
    return np.ascontiguousarray(arrays[name])

  return jax.tree_util.tree_map_with_path(take, shapes)


def _find_modules(model: ModelConfig, lora: LoraConfig) -> dict[str, str]:
  """Return transformers' name of each adapted layer by its path, such as 'layers/0/mlp/up'.

  Raises:
    UserError: if a layer has no tensor [O,I] of its own.
  """
  stored = stored_weights(model)
  users: dict[str, int] = {}
  for weight in stored.values():
    for name in weight.names:
      users[name] = users.get(name, 0) + 1
  modules = {}
  for path, outs in lora_lib.adapted_layers(model, lora).items():
    weight = stored[f'{path}/kernel']
    if not _is_plain(weight, outs) or users[weight.names[0]] > 1:
      raise UserError(
        f"PEFT's format has no adapters for {path!r} of the family {model.family!r}, whose "
        f'checkpoints store {weight.names[0]!r} jointly with other layers, or with other axes. '
        'Adapt other layers, or use the merged model.'
      )
    modules[path] = weight.names[0].removesuffix('.weight')
  return modules


def _is_plain(weight: StoredWeight, outs: int) -> bool:
  """Return whether a tensor is [O,I], with our axes in their order."""
  axes = tuple(range(len(weight.shape)))
  split = len(axes) - outs
  inner = tuple(axis.inner for axis in weight.axes if not axis.outer)
  return weight.stacked is None and inner == (axes[split:], axes[:split])


def _describe(
  model: ModelConfig, modules: Mapping[str, str], lora: LoraConfig, base: str
) -> dict[str, Any]:
  """Return adapter_config.json."""
  last = lambda name: name.rpartition('.')[2]  # noqa: E731
  every = {name.removesuffix('.weight') for w in stored_weights(model).values() for name in w.names}
  adapted = set(modules.values())
  # A short name stands for all layers with it.
  partly = {last(name) for name in every - adapted}
  targets = {last(name) if last(name) not in partly else name for name in adapted}
  return {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': base,
    'target_modules': sorted(targets),
    'r': lora.rank,
    'lora_alpha': int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
    'lora_dropout': 0.0,
    'use_rslora': False,
    'use_dora': False,
    'bias': 'none',
    'fan_in_fan_out': False,
    'modules_to_save': None,
    'init_lora_weights': True,
    'inference_mode': True,
  }


def _check_config(hf: Mapping[str, Any], lora: LoraConfig, where: str, section: str) -> None:
  """Check that adapter_config.json describes adapters of our kind, with the given settings."""
  kind, bias, start = hf.get('peft_type'), hf.get('bias', 'none'), hf.get('init_lora_weights', True)
  unsupported = {
    name: value for name, value in hf.items() if name not in _HARMLESS | _READ and value
  }
  unsupported |= {} if kind == 'LORA' else {'peft_type': kind}
  unsupported |= {} if bias == 'none' else {'bias': bias}
  unsupported |= {} if start in _PLAIN_INITS else {'init_lora_weights': start}
  if unsupported:
    name, value = next(iter(unsupported.items()))
    raise UserError(
      f'{where}: {CONFIG} has {name}={show(value)}, which is not supported. Only plain LoRA is: '
      'no DoRA, no biases, no further modules, and one rank for all layers.'
    )
  rank: Any = hf.get('r')
  alpha: Any = hf.get('lora_alpha')
  are_numbers = isinstance(rank, int) and isinstance(alpha, int | float)
  if not are_numbers or not min(rank, alpha) > 0:
    raise UserError(
      f'{where}: {CONFIG} has r={show(rank)} and lora_alpha={show(alpha)}, which must be positive '
      'numbers. Correct the file.'
    )
  # alpha / r is the scale of ours.
  scale = alpha / math.sqrt(rank) if hf.get('use_rslora') else alpha / rank
  if rank != lora.rank or not math.isclose(scale, lora.scale):
    raise UserError(
      f'{where} has rank {rank} and scale {json.dumps(scale)}, but {section}.lora_rank='
      f'{lora.rank} and {section}.lora_alpha={lora.alpha}. Set {section}.lora_rank={rank} and '
      f'{section}.lora_alpha={scale * rank}.'
    )
