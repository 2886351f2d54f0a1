"""Quantized checkpoints and model types that are not supported are refused with what to do."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import cai_jax
from cai_jax.model.config import ModelConfig
from cai_jax.model.families import unsupported
from cai_jax.model.families.family import FAMILIES, config_from_hf, config_to_hf
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import read_json
from tests.training_setup import one_device


@pytest.mark.parametrize(
  ('entries', 'original'),
  [
    ({'_name_or_path': 'meta-llama/Llama-2-7b-hf'}, "names 'meta-llama/Llama-2-7b-hf'"),
    ({'_name_or_path': 'someone/Llama-2-7b-GPTQ'}, 'Use the original checkpoint.$'),
    ({'_name_or_path': '/home/me/llama'}, 'Use the original checkpoint.$'),
    ({'base_model': 'a/b', '_name_or_path': 'c/d'}, "names 'a/b'"),
    ({}, 'Use the original checkpoint.$'),
  ],
)
@pytest.mark.parametrize(
  'method', ['gptq', 'awq', 'bitsandbytes', 'fp8', 'compressed-tensors', 'mxfp4']
)
def test_quantized_checkpoints_are_refused_with_the_original(method, entries, original):
  hf = config_to_hf(ModelConfig('llama', 8, 16, 32, 2, 4, 2, 4, 64)) | entries
  with pytest.raises(UserError, match=rf"'{method}'.*quantized.*{original}"):
    config_from_hf(hf | {'quantization_config': {'quant_method': method, 'bits': 4}})
  with pytest.raises(UserError, match=rf"'{method}'.*quantized.*{original}"):
    config_from_hf(
      {'model_type': 'mistral3', 'text_config': {'model_type': 'mistral'}}
      | {'quantization_config': {'quant_method': method}, **entries}
    )


@pytest.mark.parametrize('dtype', [np.uint8, np.int8, 'float8_e4m3fn', np.int32])
def test_quantized_tensors_are_refused_with_the_original(tiny_hf_folder, tmp_path, dtype):
  folder = shutil.copytree(tiny_hf_folder('llama2'), tmp_path / 'model')
  hf = read_json(folder / 'config.json') | {'_name_or_path': 'owner/original'}
  (folder / 'config.json').write_text(json.dumps(hf))
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  name = 'model.layers.0.mlp.up_proj.weight'
  if dtype == np.int32:  # eight numbers in each
    del tensors[name]
    tensors[name := name.replace('weight', 'qweight')] = np.zeros((4, 64), dtype)
  else:
    tensors[name] = tensors[name].astype(jax.numpy.dtype(dtype))
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
  with pytest.raises(UserError, match=rf"{name}' is .*quantized.* names 'owner/original'"):
    cai_jax.load(folder, mesh=one_device())


@pytest.mark.parametrize(
  ('model_type', 'message'),
  [
    (
      'falcon_mamba',
      r'no code for state-space \(Mamba\) layers.*nearest are qwen3_5_text, granite',
    ),
    ('deepseek_v3', 'no code for multi-head latent attention.*nearest .*llama'),
    ('t5', 'no code for an encoder with cross-attention.*nearest .*llama'),
    ('llama_2', "'llama_2' is not supported.*nearest is llama.*register it in a file"),
    ('zzz', "'zzz' is not supported. The supported types are .*qwen3.*register it in a file"),
    (None, 'model_type None is not supported'),
    (7, 'model_type 7 is not supported'),
  ],
)
def test_unsupported_types_are_refused_with_what_is_missing(model_type, message):
  with pytest.raises(UserError, match=message):
    config_from_hf({'model_type': model_type})


def test_no_supported_type_is_said_to_be_missing():
  missing = {name for entry in unsupported._MISSING for name in entry.types.split()}
  assert not missing & FAMILIES.keys()
