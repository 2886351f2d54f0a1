"""Files of transformers 5 in which the experts of a layer share tensors are read."""

import jax
import numpy as np
import pytest
import safetensors.numpy

import cai_jax
from cai_jax.model.families.family import FAMILIES
from cai_jax.model.sharding import flatten_params
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import make_mesh
from tests.families import FAMILIES as LINES
from tests.families import load_in_torch

KINDS = {kind for kind, family in FAMILIES.items() if family.fused}
NAMES = [name for name, (kind, _) in LINES.items() if kind in KINDS]
FUSED = 'model.layers.0.mlp.experts.gate_up_proj'


@pytest.fixture(params=NAMES)
def folders(request, tiny_hf_folder, tiny_tokenizer, tmp_path):
  """Return the folders of a model with a tensor for each expert, and with fused ones."""
  plain, fused = tiny_hf_folder(request.param), tmp_path / 'fused'
  load_in_torch(plain).save_pretrained(fused, save_original_format=False)
  tiny_tokenizer.save_pretrained(fused)
  return plain, fused


def test_there_are_such_families():
  assert {'mixtral', 'qwen3_moe', 'olmoe'} <= KINDS == {LINES[name][0] for name in NAMES}


@pytest.mark.parametrize('mesh', [(1, 1, 1, 1), (1, 2, 2, 2)])
def test_fused_experts_are_those_of_their_own_tensors(folders, mesh):
  *sizes, expert = mesh
  mesh = make_mesh(*sizes, expert=expert, devices=jax.devices()[: expert * np.prod(sizes)])
  expected, ours = (flatten_params(cai_jax.load(folder, mesh=mesh).params) for folder in folders)
  assert FUSED in safetensors.numpy.load_file(folders[1] / 'model.safetensors')
  assert ours.keys() == expected.keys()
  for path, value in ours.items():
    np.testing.assert_array_equal(value, expected[path])


def test_what_is_written_has_a_tensor_for_each_expert(folders, tmp_path):
  cai_jax.save(cai_jax.load(folders[1], mesh=one_device()), tmp_path / 'out')
  written, expected = (
    safetensors.numpy.load_file(folder / 'model.safetensors')
    for folder in (tmp_path / 'out', folders[0])
  )
  assert written.keys() == expected.keys()
  assert all((written[name] == expected[name]).all() for name in written)


def test_experts_of_another_size_and_missing_ones_are_refused(folders):
  path = folders[1] / 'model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  safetensors.numpy.save_file(tensors | {FUSED: tensors[FUSED][:, :-2]}, path)
  with pytest.raises(UserError, match=rf"{FUSED}' has shape .*, 2 × \w*intermediate_size, "):
    cai_jax.load(folders[1], mesh=one_device())
  del tensors[FUSED]
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(UserError, match=rf"'{FUSED}' is missing"):
    cai_jax.load(folders[1], mesh=one_device())


def one_device():
  return make_mesh(devices=jax.devices()[:1])
