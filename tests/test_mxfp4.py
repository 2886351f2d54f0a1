"""MXFP4 checkpoints of gpt-oss are read as transformers dequantizes them, and damage is refused."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import cai_jax
from cai_jax.model import mxfp4
from cai_jax.model.families.family import config_from_hf
from cai_jax.model.sharding import flatten_params
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import read_json
from cai_jax.runtime.mesh import make_mesh
from tests.families import load_in_torch, make_config, randomize

TOKENS = np.random.default_rng(0).integers(3, 300, (2, 24))
EXPERTS = ('gate_up_proj', 'down_proj')
FIRST = 'model.layers.0.mlp.experts.gate_up_proj'


def draw_stored(seed, *shape):
  """Return blocks and scales; the numbers are about as large as those of a trained model."""
  rng = np.random.default_rng(seed)
  blocks = rng.integers(0, 256, (*shape, 16), dtype=np.uint8)
  return blocks, rng.integers(122, 126, shape, dtype=np.uint8)


@pytest.fixture(scope='module')
def quantized(tmp_path_factory, tiny_tokenizer):
  """Return the folder of a small gpt-oss in MXFP4, and that of the same model in float32."""
  model = transformers.AutoModelForCausalLM.from_config(
    make_config('gpt_oss', intermediate_size=64)
  )
  model = model.float()
  randomize(model, 3)
  packed = {}
  for number, layer in enumerate(model.model.layers):
    for i, name in enumerate(EXPERTS):
      weight = getattr(layer.mlp.experts, name)
      experts, ins, outs = weight.shape
      stored = [torch.tensor(x) for x in draw_stored(2 * number + i, experts, outs, ins // 32)]
      weight.data = convert_moe_packed_tensors(*stored).float()
      full = f'model.layers.{number}.mlp.experts.{name}'
      packed |= {full: None, full + '_blocks': stored[0], full + '_scales': stored[1]}
  plain, folder = tmp_path_factory.mktemp('plain'), tmp_path_factory.mktemp('quantized') / 'model'
  model.save_pretrained(plain)
  tiny_tokenizer.save_pretrained(plain)
  shutil.copytree(plain, folder)
  tensors = safetensors.torch.load_file(plain / 'model.safetensors') | packed
  tensors = {name: x for name, x in tensors.items() if x is not None}
  safetensors.torch.save_file(tensors, folder / 'model.safetensors')
  method = {'quant_method': 'mxfp4', 'modules_to_not_convert': ['lm_head']}
  hf = read_json(folder / 'config.json') | {'quantization_config': method}
  (folder / 'config.json').write_text(json.dumps(hf))
  return folder, plain


def test_all_numbers_are_those_of_transformers():
  """For every byte and every scale but the one that stands for no number."""
  blocks = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(255, 1)
  scales = np.arange(255, dtype=np.uint8)[None, :, None].repeat(16, 2)
  theirs = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales)).float().numpy()
  ours = mxfp4.Mxfp4Slice(blocks, scales)[:1, 0:512, :255].astype(np.float32)
  np.testing.assert_array_equal(ours, theirs)
  assert np.isnan(mxfp4.decode(blocks[0], np.full((255, 16), 255, np.uint8)).astype(float)).all()


def test_a_region_is_part_of_the_whole():
  stored = mxfp4.Mxfp4Slice(*draw_stored(0, 3, 6, 4))
  whole = stored[:3, 0:128, :6]
  assert whole.shape == (3, 128, 6)
  for region in np.s_[1:3, 32:96, 2:5], np.s_[0:1, 30:33, 0:6], np.s_[2:3, 127:128, 5:6]:
    np.testing.assert_array_equal(stored[region], whole[region])


@pytest.mark.parametrize('mesh', [(1, 1, 1, 1), (1, 4, 1, 2)])
def test_a_checkpoint_equals_its_dequantized_one(quantized, mesh):
  *sizes, expert = mesh
  mesh = make_mesh(*sizes, expert=expert, devices=jax.devices()[: expert * np.prod(sizes)])
  ours, expected = (flatten_params(cai_jax.load(folder, mesh=mesh).params) for folder in quantized)
  assert ours.keys() == expected.keys()
  for path, value in ours.items():
    np.testing.assert_array_equal(value, expected[path])


def test_an_export_is_not_quantized(quantized, tmp_path):
  lm = cai_jax.load(quantized[0], mesh=make_mesh(devices=jax.devices()[:1]))
  cai_jax.save(lm, tmp_path / 'out')
  assert 'quantization_config' not in read_json(tmp_path / 'out' / 'config.json')
  with torch.no_grad():
    expected = load_in_torch(quantized[1])(torch.tensor(TOKENS)).logits
    saved = load_in_torch(tmp_path / 'out')(torch.tensor(TOKENS)).logits
  np.testing.assert_allclose(lm.logits(TOKENS), expected, atol=1e-4, rtol=0)
  np.testing.assert_array_equal(saved, expected)


def test_other_methods_are_refused(quantized):
  hf = read_json(quantized[0] / 'config.json')
  assert config_from_hf(hf).experts.number == 4
  with pytest.raises(UserError, match=r"'fp8'.*quantized"):
    config_from_hf(hf | {'quantization_config': {'quant_method': 'fp8'}})


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda t: t.pop(FIRST + '_scales'), r"gate_up_proj_blocks', but no .*_scales'"),
    (lambda t: t.pop(FIRST + '_blocks'), r"gate_up_proj_scales', but no .*_blocks'"),
    (lambda t: t.update({FIRST: torch.zeros(3)}), 'are the same weight'),
    (
      lambda t: t.update({FIRST + '_scales': t[FIRST + '_scales'][..., :0]}),
      r'U8 of shape \[E, O, B, 16\]',
    ),
    (lambda t: t.update({FIRST + '_scales': t[FIRST + '_scales'].int()}), r'is I32\['),
    (lambda t: t[FIRST + '_scales'].fill_(255), 'has a NaN'),
    (
      lambda t: t.update({FIRST + end: t[FIRST + end][:, :96] for end in ('_blocks', '_scales')}),
      r'has shape \(4, 32, 96\).*implies \(4, 32, 128\)',
    ),
  ],
)
def test_damaged_checkpoints_are_refused(quantized, change, message, tmp_path):
  folder = shutil.copytree(quantized[0], tmp_path / 'model')
  tensors = safetensors.torch.load_file(folder / 'model.safetensors')
  change(tensors)
  tensors = {name: x.contiguous() for name, x in tensors.items()}
  safetensors.torch.save_file(tensors, folder / 'model.safetensors')
  with pytest.raises(UserError, match=message):
    cai_jax.load(folder, mesh=make_mesh(devices=jax.devices()[:1]))
