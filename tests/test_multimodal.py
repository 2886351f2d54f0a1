"""Text halves of multimodal checkpoints, and configs with a text config."""

import dataclasses
import logging
import shutil

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
import transformers

import cai_jax
from cai_jax.model.config import ModelConfig
from cai_jax.model.families import llama
from cai_jax.model.families.family import FAMILIES, config_from_hf, config_to_hf
from cai_jax.model.folder import load_vocabulary
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import read_json
from tests.training_setup import one_device


@pytest.fixture(scope='module', params=['mistral', 'ministral3'])
def multimodal(request, tmp_path_factory, tiny_tokenizer):
  """Return the folder of a small Mistral 3 with images, and torch's logits for TOKENS."""
  rope = dict(rope_type='yarn', factor=4.0, original_max_position_embeddings=4)
  if request.param == 'ministral3':
    rope['llama_4_scaling_beta'] = 0.5
  text = dict(
    model_type=request.param, vocab_size=384, hidden_size=32, intermediate_size=48, head_dim=8,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, sliding_window=None,
    rope_parameters=rope,
  )  # fmt: skip
  vision = dict(
    model_type='pixtral', hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, head_dim=8, image_size=16, patch_size=8,
  )  # fmt: skip
  config = transformers.AutoConfig.for_model(
    'mistral3', text_config=text, vision_config=vision, tie_word_embeddings=False
  )
  torch.manual_seed(0)
  model = transformers.Mistral3ForConditionalGeneration(config).float()
  folder = tmp_path_factory.mktemp('multimodal')
  model.save_pretrained(folder)
  tiny_tokenizer.save_pretrained(folder)
  with torch.no_grad():
    return folder, model(torch.tensor(TOKENS)).logits.numpy()


TOKENS = np.random.default_rng(0).integers(3, 300, (2, 12))


@pytest.mark.parametrize('form', ['as written', 'transformers 5', 'transformers 4'])
def test_the_text_half_of_a_multimodal_checkpoint_is_loaded(multimodal, form, tmp_path, caplog):
  folder = shutil.copytree(multimodal[0], tmp_path / 'model')
  weights = folder / 'model.safetensors'
  if form != 'as written':
    rename(weights, form)
  with caplog.at_level(logging.INFO):
    cai_jax.model.lm.inspect_model(folder)
    lm = cai_jax.load(folder, mesh=one_device())
  assert load_vocabulary(folder).size == 384  # of text_config
  half = lm.config.family
  messages = [r.message for r in caplog.records if f'only the {half} model' in r.message]
  assert len(messages) == 1
  assert 'vision_tower.* (' in messages[0] and 'multi_modal_projector.* (' in messages[0]
  np.testing.assert_allclose(lm.logits(TOKENS), multimodal[1], atol=1e-4)
  cai_jax.save(lm, tmp_path / 'text')
  written = read_json(tmp_path / 'text' / 'config.json')
  assert written['model_type'] == half and 'text_config' not in written
  assert written['architectures'] == [f'{half.capitalize()}ForCausalLM']
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'text')
  with torch.no_grad():
    logits = model(torch.tensor(TOKENS)).logits.numpy()
  np.testing.assert_allclose(logits, multimodal[1], atol=1e-4)


def rename(path, form):
  """Give the weights of a file the prefixes of a version of transformers."""
  tensors = {}
  for name, x in safetensors.numpy.load_file(path).items():
    bare = name.replace('language_model.', '').removeprefix('model.')
    if bare.startswith(('vision_tower', 'multi_modal')):
      prefix = 'model.' if form == 'transformers 5' else ''
    elif bare.startswith('lm_head'):
      prefix = '' if form == 'transformers 5' else 'language_model.'
    else:
      prefix = 'model.language_model.' if form == 'transformers 5' else 'language_model.model.'
    tensors[prefix + bare] = x
  safetensors.numpy.save_file(tensors, path)


def test_other_weights_beside_a_text_half_are_refused(multimodal, tmp_path):
  folder = shutil.copytree(multimodal[0], tmp_path / 'model')
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  path = folder / 'model.safetensors'
  safetensors.numpy.save_file(tensors | {'speech.weight': np.zeros(3, np.float32)}, path)
  with pytest.raises(UserError, match="'speech.weight' does not belong to the \\w+ model"):
    cai_jax.load(folder, mesh=one_device())
  twice = {name: x for name, x in tensors.items() if name.endswith('norm.weight')}
  twice = {'model.norm.weight': np.zeros(32, np.float32)}
  twice |= {'language_model.model.norm.weight': np.zeros(32, np.float32)}
  safetensors.numpy.save_file(tensors | twice, path)
  with pytest.raises(UserError, match='are the same weight of the model'):
    cai_jax.load(folder, mesh=one_device())


def test_a_text_model_ignores_no_vision_tower(tiny_hf_folder, tmp_path):
  folder = shutil.copytree(tiny_hf_folder('llama2'), tmp_path / 'model')
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  tensors['vision_tower.weight'] = np.zeros(3, np.float32)
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
  with pytest.raises(UserError, match="'vision_tower.weight' does not belong"):
    cai_jax.load(folder, mesh=one_device())


MULTIMODAL = {'model_type': 'mistral3', 'text_config': {'model_type': 'mistral'}}


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'text_config': None}, "'mistral3' is a multimodal model, but there is no text_config"),
    ({'text_config': {'model_type': 'mamba'}}, "text_config.model_type is 'mamba'.*mistral"),
    ({'model_type': 'llava'}, "'llava' with the text_config of 'mistral' is not supported"),
    ({'final_logit_softcapping': 3.0}, 'config.json: final_logit_softcapping=3.0'),
    (
      {'text_config': {'model_type': 'mistral', 'final_logit_softcapping': 3.0}},
      'in text_config, final_logit_softcapping=3.0',
    ),
    ({}, 'in text_config, hidden_size is None'),
    ({'text_config': {'hidden_act': 'silu'}}, 'in text_config, hidden_size is None'),
    (
      {'text_config': {'model_type': 'mistral', 'tie_word_embeddings': True}}
      | {'tie_word_embeddings': False},
      'tie_word_embeddings=False contradicts text_config.tie_word_embeddings=True',
    ),
  ],
)
def test_text_configs_that_do_not_fit_are_refused(changes, message):
  with pytest.raises(UserError, match=message):
    config_from_hf({**MULTIMODAL, **changes})


def test_a_text_config_without_a_type_is_that_of_the_default():
  text = config_to_hf(ModelConfig('mistral', 8, 16, 32, 2, 4, 2, 4, 64))
  del text['model_type']
  assert config_from_hf({'model_type': 'mistral3', 'text_config': text}).family == 'mistral'


def test_an_option_is_read_by_the_family_that_declares_it(restored_registries):
  def read_config(hf):
    cap = hf.get('final_logit_softcapping')
    return dataclasses.replace(llama.read_config(hf), family='capped', logit_cap=cap)

  capped = dataclasses.replace(
    FAMILIES['llama'], read_config=read_config, options=('final_logit_softcapping',)
  )
  FAMILIES.register('capped')(capped)
  plain = config_to_hf(ModelConfig('llama', 8, 16, 32, 2, 4, 2, 4, 64))
  hf = plain | {'final_logit_softcapping': 30.0}
  assert config_from_hf(hf | {'model_type': 'capped'}).logit_cap == 30.0
  with pytest.raises(UserError, match=r'final_logit_softcapping=30.0 is not supported'):
    config_from_hf(hf)
  with pytest.raises(UserError, match='attn_logit_softcapping=50.0'):
    config_from_hf(hf | {'model_type': 'capped', 'attn_logit_softcapping': 50.0})
  with pytest.raises(ValueError, match="no 'logit_softcap'"):
    dataclasses.replace(capped, options=('logit_softcap',))
