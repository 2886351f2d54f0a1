"""Adapters in PEFT's format: the names of the tensors, and what is refused."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from cai_jax.model import lora, peft
from cai_jax.model.config import ModelConfig
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import read_json, write_json

CONFIG = ModelConfig('llama', 64, 16, 24, 2, 4, 2, 8, 128)
LORA = lora.LoraConfig(3, 6.0, 'attention/(query|output)|layers/1/mlp/down')
NAMES = {
  **{f'layers/{i}/attention/query': f'model.layers.{i}.self_attn.q_proj' for i in range(2)},
  **{f'layers/{i}/attention/output': f'model.layers.{i}.self_attn.o_proj' for i in range(2)},
  'layers/1/mlp/down': 'model.layers.1.mlp.down_proj',
}


@pytest.fixture(scope='module')
def adapters():
  initial = lora.init(CONFIG, LORA, jax.random.key(0))
  numbers = lambda x: np.arange(x.size, dtype=np.float32).reshape(x.shape)  # noqa: E731
  return jax.tree.map(lambda x: np.asarray(x) + numbers(x), initial)


@pytest.fixture
def folder(adapters, tmp_path):
  peft.write_adapters(tmp_path / 'adapter', adapters, CONFIG, LORA, 'some/model')
  return tmp_path / 'adapter'


def test_names_and_axes_are_those_of_peft(folder, adapters):
  tensors = safetensors.numpy.load_file(folder / peft.WEIGHTS)
  prefix = 'base_model.model.'
  assert tensors.keys() == {
    f'{prefix}{name}.lora_{part}.weight' for name in NAMES.values() for part in 'AB'
  }
  for path, name in NAMES.items():
    _, layer, *rest = path.split('/')
    own = adapters['layers'][int(layer)][rest[0]][rest[1]]['adapter']
    np.testing.assert_array_equal(tensors[f'{prefix}{name}.lora_A.weight'], own['a'].T)
    np.testing.assert_array_equal(tensors[f'{prefix}{name}.lora_B.weight'], own['b'].T)
  config = read_json(folder / peft.CONFIG)
  assert config['r'] == 3 and config['lora_alpha'] == 6 and config['peft_type'] == 'LORA'
  # A short name where all layers have an adapter, and the whole name where some have.
  assert config['target_modules'] == ['model.layers.1.mlp.down_proj', 'o_proj', 'q_proj']
  assert config['base_model_name_or_path'] == 'some/model'


def test_reading_is_the_inverse_of_writing(folder, adapters):
  read = peft.read_adapters(folder, CONFIG, LORA)
  assert jax.tree.structure(read) == jax.tree.structure(adapters)
  jax.tree.map(np.testing.assert_array_equal, read, adapters)


def test_a_rank_stabilized_scale_is_read(folder, adapters):
  write_json(folder / peft.CONFIG, read_json(folder / peft.CONFIG) | {'use_rslora': True})
  with pytest.raises(
    UserError, match=r'rank 3 and scale 3\.46.* Set train.lora_rank=3 and .*10\.39'
  ):
    peft.read_adapters(folder, CONFIG, LORA)
  same = lora.LoraConfig(3, 6.0 * 3**0.5, LORA.modules)
  jax.tree.map(np.testing.assert_array_equal, peft.read_adapters(folder, CONFIG, same), adapters)


@pytest.mark.parametrize(
  'entries, match',
  [
    ({'use_dora': True}, 'use_dora=True, which is not supported'),
    ({'bias': 'all'}, "bias='all', which is not supported"),
    ({'modules_to_save': ['lm_head']}, "modules_to_save=.'lm_head'., which is not supported"),
    ({'rank_pattern': {'q_proj': 4}}, 'rank_pattern=.*, which is not supported'),
    ({'peft_type': 'IA3'}, "peft_type='IA3', which is not supported"),
    ({'init_lora_weights': 'pissa'}, "init_lora_weights='pissa', which is not supported"),
    ({'use_something_new': 1}, 'use_something_new=1, which is not supported'),
    ({'r': 4}, 'has rank 4 and scale 1.5.*Set prefer.lora_rank=4 and prefer.lora_alpha=6.0'),
    ({'r': 'many'}, "r='many' and lora_alpha=6, which must be positive numbers"),
  ],
)
def test_other_adapters_are_refused(folder, entries, match):
  write_json(folder / peft.CONFIG, read_json(folder / peft.CONFIG) | entries)
  with pytest.raises(UserError, match=match):
    peft.read_adapters(folder, CONFIG, LORA, 'prefer')


def test_adapters_of_other_layers_and_sizes_are_refused(folder):
  fewer, more = (lora.LoraConfig(3, 6.0, x) for x in ('attention/query', 'attention/|mlp/down'))
  with pytest.raises(UserError, match='has the tensor .*_proj.*, which is no adapter'):
    peft.read_adapters(folder, CONFIG, fewer)
  with pytest.raises(UserError, match='has no tensor for layers/0/attention/key/adapter/a'):
    peft.read_adapters(folder, CONFIG, more)
  larger = ModelConfig('llama', 64, 32, 24, 2, 4, 2, 8, 128)
  with pytest.raises(UserError, match=r'has \(.* for .*, and shape \(.* is needed'):
    peft.read_adapters(folder, larger, LORA)
  (folder / peft.WEIGHTS).write_bytes(b'\x08\0\0\0\0\0\0\0{}')
  with pytest.raises(UserError):
    peft.read_adapters(folder, CONFIG, LORA)
  (folder / peft.WEIGHTS).unlink()
  with pytest.raises(UserError, match='has no adapter_model.safetensors'):
    peft.read_adapters(folder, CONFIG, LORA)


def test_layers_that_share_a_tensor_have_no_form_in_peft():
  phi = ModelConfig('phi3', 64, 16, 24, 1, 4, 2, 8, 128)
  for modules in ('attention/query', 'mlp/up'):
    with pytest.raises(UserError, match="prefer.lora_export: PEFT's format has no adapters for"):
      peft.check_export(phi, lora.LoraConfig(2, 2.0, modules), 'prefer')
  peft.check_export(phi, lora.LoraConfig(2, 2.0, 'attention/output|mlp/down'), 'train')


@pytest.mark.slow
@pytest.mark.parametrize('family', ['llama3', 'qwen2', 'gemma3'])
def test_peft_gives_our_logits_and_we_read_its_adapters(family, tiny_hf_folder, tmp_path):
  library = pytest.importorskip('peft')
  import torch
  import transformers

  from cai_jax.model import lm as models
  from cai_jax.runtime.mesh import make_mesh

  folder = tiny_hf_folder(family)
  lm = models.load(folder, mesh=make_mesh(devices=jax.devices()[:1]))
  config = lora.LoraConfig(3, 6.0, r'attention/(query|output)|layers/1/mlp/')
  adapters = jax.tree.map(lambda x: x + 0.1, lora.init(lm.config, config, jax.random.key(0)))
  peft.write_adapters(tmp_path / 'ours', adapters, lm.config, config, str(folder))
  tokens = np.random.default_rng(0).integers(0, 300, (2, 12))
  graph, _ = lora.abstract_model(lm.config, config)
  positions = np.broadcast_to(np.arange(12), tokens.shape).astype(np.int32)
  ours = models.compute_logits(graph, lora.join(adapters, lm.params), tokens, positions, None)
  base = transformers.AutoModelForCausalLM.from_pretrained(folder).float()
  model = library.PeftModel.from_pretrained(base, tmp_path / 'ours')
  with torch.no_grad():
    theirs = model(torch.tensor(tokens)).logits.numpy()
  assert np.abs(theirs - lm.logits(tokens)).max() > 0.1  # the adapters have an effect
  np.testing.assert_allclose(ours, theirs, atol=1e-4)
  model.save_pretrained(tmp_path / 'theirs')
  again = peft.read_adapters(tmp_path / 'theirs', lm.config, config)
  jax.tree.map(np.testing.assert_array_equal, again, jax.device_get(adapters))
  content = json.loads((tmp_path / 'theirs' / peft.CONFIG).read_text())
  assert content['r'] == 3
