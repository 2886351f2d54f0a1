"""The large configs of preferences, with a small model in place of theirs."""

import importlib
import json

import pytest

from cai_jax import pipeline
from cai_jax.data.quality import FLAGS
from tests.pipeline_setup import save_random_model, set_fields

SETS = ('harmful', 'helpful', 'eval_harmful')
SMALL = {'max_length': 1024, 'batch_size': 8, 'accumulation': 1, 'attention': 'blocks'}


@pytest.fixture(scope='module')
def stand_in(tmp_path_factory):
  """Return the folder of a random model with room for the contexts of the configs."""
  return save_random_model(tmp_path_factory.mktemp('stand_in'), max_positions=32768)


def make_config(name, model, folder, data_dir):
  """Return a config with the small model, prompts, and files of this machine."""
  config = importlib.import_module(f'configs.{name}').get_config()
  config.model.base = str(model)
  for prompts in SETS:
    if config.prompts[prompts].source:
      path = folder / f'{prompts}.txt'
      path.write_text(''.join(f'The {prompts} request {i}.\n' for i in range(12)))
      config.prompts[prompts].source = str(path)
  if config.model.init:  # the paper's
    paper = data_dir('cai_paper') / 'prompts'
    config.model.init = config.label.model = config.reward.init = str(model)
    config.constitution.path = str(paper)
    config.label.constitution = str(paper / 'RLMadisonInstructions.json')
  config.mesh.update(data=-1, fsdp=1, tensor=1)
  for section in (config.train, config.reward, config.prefer):
    section.update(**SMALL)
  for stage in config.sampling.values():
    stage.max_tokens = 16
  return config


@pytest.mark.parametrize('name', ['bai2022_rl_cai_feedback', 'handbook_dpo'])
def test_a_config_passes_all_checks(name, stand_in, data_dir, tmp_path):
  run = pipeline.build(make_config(name, stand_in, tmp_path, data_dir), tmp_path / 'run')
  pipeline.check_run(run, pipeline.default_stages(run))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['bai2022_rl_cai_feedback', 'handbook_dpo'])
def test_a_config_runs_to_its_end(name, stand_in, data_dir, tmp_path):
  config = make_config(name, stand_in, tmp_path, data_dir)
  changes = {'engine__slots': 8, 'train__drop_truncated': False, 'feedback__rounds': 1}
  for section in ('reward', 'prefer'):
    changes |= {f'{section}__drop_truncated': False, f'{section}__warmup': 0.0}
  set_fields(**changes)(config)
  config.feedback.max_rate.update(dict.fromkeys(FLAGS, 1.0))  # a random model
  run = pipeline.build(config, tmp_path / 'run')
  stages = pipeline.default_stages(run)
  pipeline.run_stages(run)
  manifest = json.loads((tmp_path / 'run' / 'manifest.json').read_text())['stages']
  assert list(manifest) == stages and {'prefer', 'evaluate'} <= {*stages}
  assert manifest['prefer']['policy']['pairs']['kept'] > 0
