"""Saved models: transformers 5 and 4.57 load them and generate the tokens that we sample."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import cai_jax
from cai_jax import pipeline
from cai_jax.dialogue import Dialogue
from cai_jax.dialogue.template_options import bind_template_options
from cai_jax.model import lora
from cai_jax.model.sharding import flatten_params
from cai_jax.pipeline import stage_train
from cai_jax.pipeline.models import make_dialogue
from cai_jax.runtime.files import read_json
from cai_jax.runtime.mesh import make_mesh
from cai_jax.tiny.files import MODELS
from tests.families import FAMILIES
from tests.pipeline_setup import small

pytestmark = pytest.mark.usefixtures('single_device')

QUESTION = [{'role': 'user', 'content': 'Repair 12 bicycles.'}]
NEW_TOKENS = 16
TRANSFORMERS_4 = ('transformers==4.57.1', 'tokenizers==0.22.1', 'huggingface_hub==0.36.0')
SAMPLING = {'do_sample': True, 'temperature': 0.6, 'top_p': 0.95, 'top_k': 20}

# Loads folders and prints a line for each: what it generates greedily, and what its files say.
SCRIPT = """
import json, sys
import transformers

question, length = json.loads(sys.argv[1]), int(sys.argv[2])
for folder in sys.argv[3:]:
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype='float32')
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  prompt = tokenizer.apply_chat_template(
    question, add_generation_prompt=True, return_tensors='pt', return_dict=True
  )
  start = prompt['input_ids'].shape[1]
  reply = model.generate(
    **prompt, max_new_tokens=length, do_sample=False, temperature=None, top_p=None, top_k=None
  )
  print(json.dumps({
    'version': transformers.__version__,
    'prompt': prompt['input_ids'][0].tolist(),
    'reply': reply[0, start:].tolist(),
    'eos': model.generation_config.eos_token_id,
    'special': sorted(tokenizer.all_special_ids),
  }))
"""


def load(folder):
  return cai_jax.load(folder, mesh=make_mesh(1, devices=jax.devices()[:1]))


def edit_json(path, **changes):
  path.write_text(json.dumps({**read_json(path), **changes}))


def with_merged_adapters(lm):
  """Return a model with adapters that differ from 0 merged into its weights."""
  config = lora.LoraConfig(2, 8.0, 'attention/|mlp/')
  adapters = lora.init(lm.config, config, jax.random.key(0))
  adapters = jax.tree.map(lambda x: x + 0.05, adapters)
  return dataclasses.replace(lm, params=lora.merge(lm.params, adapters, config))


@pytest.fixture(scope='module')
def base_checkpoint(tmp_path_factory):
  """Return the embedded model as base checkpoints come.

  Texts end with another token than the turns of its chat template, and there are sampling defaults.
  """
  folder = tmp_path_factory.mktemp('base') / 'model'
  shutil.copytree(MODELS['tiny'], folder)
  edit_json(folder / 'config.json', eos_token_id=0)
  edit_json(folder / 'generation_config.json', eos_token_id=0, **SAMPLING)
  edit_json(folder / 'tokenizer_config.json', eos_token='<|pad|>')
  return folder


@pytest.fixture(scope='module')
def trained(base_checkpoint, tmp_path_factory):
  """Return the folder of M_aligned after a run of seconds from `base_checkpoint`."""
  workdir = tmp_path_factory.mktemp('run')
  config = small(base_checkpoint)
  config.train.export_dtype = 'bfloat16'
  pipeline.run_stages(pipeline.build(config, workdir), ['generate', 'train'])
  return workdir / 'model'


@pytest.fixture(scope='module')
def exports(tiny_hf_folder, trained, tmp_path_factory):
  """Return the folder of a saved model by kind: after a run, plain, and with merged adapters."""
  parent, lm = tmp_path_factory.mktemp('exports'), load(tiny_hf_folder('llama3'))
  cai_jax.save(lm, parent / 'llama3')
  cai_jax.save(with_merged_adapters(lm), parent / 'lora')
  return {'trained': trained, 'llama3': parent / 'llama3', 'lora': parent / 'lora'}


def check_generation(exports, packages=''):
  """Check what transformers generates, with the packages of a folder before the installed ones."""
  done = subprocess.run(
    [
      sys.executable,
      '-c',
      SCRIPT,
      json.dumps(QUESTION),
      str(NEW_TOKENS),
      *map(str, exports.values()),
    ],
    env={**os.environ, 'PYTHONPATH': str(packages)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  rows = [json.loads(line) for line in done.stdout.splitlines()]
  sampling = cai_jax.SamplingConfig(max_tokens=NEW_TOKENS, temperature=0.0)
  for (kind, folder), row in zip(exports.items(), rows, strict=True):
    lm = load(folder)
    dialogue = Dialogue(lm.tokenizer, 'chat', lm.eos_token_ids)
    (completion,) = cai_jax.generate(lm, [QUESTION], sampling)
    eos = row['eos'] if isinstance(row['eos'], list) else [row['eos']]
    assert row['prompt'] == dialogue.prompt(QUESTION), kind
    assert row['reply'] == completion.tokens, kind
    assert set(eos) == set(dialogue.stop_token_ids), kind
    assert row['special'] == sorted(lm.tokenizer.all_special_ids), kind
  return {row['version'] for row in rows}


def test_transformers_5_generates_what_we_sample(exports):
  (version,) = check_generation(exports)
  assert version.startswith('5.')


@pytest.mark.slow
def test_transformers_4_generates_what_we_sample(exports, tiny_hf_folder, tmp_path):
  """For the other families, `test_family_logits` compares saved models with transformers 5."""
  families = {family: tmp_path / family for family in FAMILIES if family not in exports}
  for family, folder in families.items():
    cai_jax.save(load(tiny_hf_folder(family)), folder)
  packages = os.environ.get('CAI_JAX_TRANSFORMERS4')
  if packages is None:
    packages = tmp_path / 'packages'
    pip = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target']
    subprocess.run([*pip, str(packages), *TRANSFORMERS_4], check=True)
  (version,) = check_generation(exports | families, packages)
  assert version.startswith('4.57.')


def test_the_model_of_a_run_stops_where_its_training_texts_stop(trained, base_checkpoint):
  """The tokens are those of the checkpoint and the end of turn of its chat template."""
  base = load(base_checkpoint)
  assert base.eos_token_ids == (0,)
  end = base.tokenizer.convert_tokens_to_ids('<|end|>')
  for file in ('config.json', 'generation_config.json'):
    assert read_json(trained / file)['eos_token_id'] == [0, end]
  assert load(trained).eos_token_ids == (0, end)
  assert load(trained).tokenizer.eos_token_id == 0  # templates may write it


def test_sampling_settings_of_a_checkpoint_are_kept(trained, base_checkpoint, tmp_path):
  cai_jax.save(load(base_checkpoint), tmp_path / 'saved')
  before = read_json(base_checkpoint / 'generation_config.json')
  assert read_json(tmp_path / 'saved' / 'generation_config.json') == before
  after = read_json(trained / 'generation_config.json')
  assert after == {**before, 'eos_token_id': [0, 4]} and after['top_k'] == 20


def test_the_model_of_a_run_has_the_dtype_asked_for(trained):
  lm = load(trained)
  assert read_json(trained / 'config.json')['dtype'] == 'bfloat16'
  for weight in flatten_params(lm.params).values():
    np.testing.assert_array_equal(weight, np.asarray(weight).astype('bfloat16').astype('float32'))


def test_by_default_a_run_keeps_the_dtype_of_its_initial_model(base_checkpoint, tmp_path):
  cai_jax.save(load(base_checkpoint), tmp_path / 'base', dtype='float16')
  run = pipeline.build(small(tmp_path / 'base'), tmp_path / 'run')
  assert run.config.train.export_dtype == 'base'
  lm = load(tmp_path / 'base')
  stage_train.export_model(run, lm, lm.params, make_dialogue(run, lm))
  assert read_json(tmp_path / 'run' / 'model' / 'config.json')['dtype'] == 'float16'


def test_special_tokens_are_written_for_transformers_4_and_5(base_checkpoint, tmp_path):
  lm = load(base_checkpoint)
  cai_jax.save(lm, tmp_path / 'saved')
  settings = read_json(tmp_path / 'saved' / 'tokenizer_config.json')
  assert settings['additional_special_tokens'] == ['<|user|>', '<|assistant|>']
  assert 'extra_special_tokens' not in settings and 'is_local' not in settings
  assert settings['model_input_names'] == ['input_ids', 'attention_mask']  # no token_type_ids
  assert load(tmp_path / 'saved').tokenizer.all_special_ids == lm.tokenizer.all_special_ids


def test_template_options_are_part_of_the_saved_template(tiny_tokenizer):
  template = "\n  {% if thinking %}think {{ level[0] }} {% endif %}{{ messages[0]['content'] }}"
  tokenizer = tiny_tokenizer.__class__(
    tokenizer_object=tiny_tokenizer.backend_tokenizer, chat_template=template
  )
  options = (('thinking', True), ('level', ('hïgh "\n', None, 1)))
  bound = bind_template_options(tokenizer, options)
  assert bind_template_options(tokenizer, ()) is tokenizer and tokenizer.chat_template == template
  expected = tokenizer.apply_chat_template(QUESTION, tokenize=False, **dict(options))
  assert bound.apply_chat_template(QUESTION, tokenize=False) == expected
  assert 'think hïgh "\n ' in expected
  for other in ({'thinking': False}, {'level': ['low']}):
    both = {**dict(options), **other}
    expected = tokenizer.apply_chat_template(QUESTION, tokenize=False, **both)
    assert bound.apply_chat_template(QUESTION, tokenize=False, **other) == expected
