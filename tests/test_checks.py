"""What a run refuses before any work."""

import json
import shutil

import pytest
import safetensors.numpy

from cai_jax import pipeline
from cai_jax.runtime.errors import UserError
from cai_jax.tiny.files import MODELS
from tests.pipeline_setup import set_fields, small


def refused(match, random_model, workdir, change, stages=('generate',)):
  config = small(random_model)
  change(config)
  with pytest.raises(UserError, match=match):
    pipeline.run_stages(pipeline.build(config, workdir), list(stages))
  assert not (workdir / 'd_cai').exists() and not (workdir / 'journal').exists()


@pytest.mark.parametrize(
  'fields, match',
  [
    ({'train__speed': 3}, 'The config has no field train.speed'),
    ({'train__learning_rate': -1.0}, 'learning_rate'),
    ({'train__filters': ('odd',)}, "train.filters=.'odd',. must be a tuple of names"),
    ({'feedback__max_rate__odd': 0.5}, 'The config has no field feedback.max_rate.odd'),
    ({'feedback__max_rate__empty': 1.5}, 'max_rate.empty=1.5'),
    ({'feedback__helpful_samples': 0}, 'helpful_samples=0'),
    (
      {'feedback__helpful_samples': 2, 'sampling__initial__temperature': 0.0},
      'helpful_samples=2 answers would all be the same',
    ),
    ({'report__published': 'nowhere.jsonl'}, 'report.published: nowhere.jsonl cannot be read'),
    ({'evaluation__scorer': 'me'}, "scorer='me'"),
    ({'prompts__harmful__source': ''}, 'prompts.harmful.source is empty'),
    (
      {'prompts__harmful__source': 'nowhere.jsonl', 'prompts__harmful__name': ''},
      'nowhere.jsonl: there is no such file',
    ),
    ({'constitution__path': 'nowhere.yaml'}, 'nowhere.yaml: there is no such constitution'),
    ({'model__base': '/nowhere/at/all'}, '/nowhere/at/all'),
    ({'model__init': '/nowhere/at/all'}, '/nowhere/at/all'),
    ({'train__batch_size': 12}, 'train.batch_size'),
    ({'engine__slots': 12}, 'engine.slots'),
    ({'mesh__tensor': 3}, 'does not fit 8 devices'),
    ({'train__max_length': 4096}, 'max_length=4096'),
    ({'feedback__rounds': 30, 'feedback__context': 'growing'}, 'can reach'),
    ({'prompts__eval_harmful__split': 'train'}, 'occur in the training prompts'),
    ({'prompts__helpful__source': ''}, 'helpfulness_share'),
    ({'train__helpfulness_share': 0.9}, 'needs 90 helpful prompts'),
    ({'train__max_length': 5}, 'holds no prompt with its reply'),
    ({'train__learning_rate': float('nan')}, 'learning_rate=nan'),
    ({'seed': -1}, 'seed=-1'),
    ({'sampling__revision__stop_token_ids': tuple(range(20, 36))}, 'At most 16'),
    ({'sampling__revision__stop_token_ids': (99999,)}, 'each between 0 and 1023'),
    ({'prompts__harmful__shuffle': True}, 'tiny: this source does not support shuffle'),
    ({'prompts__harmful__split': 'other'}, 'other'),
    ({'constitution__tags': ('no such tag',)}, 'no such tag'),
    ({'feedback__rounds': 0}, 'rounds=0'),
    ({'train__attention': 'splash'}, "train.attention: attention 'splash' runs on TPUs only"),
    ({'train__remat': 'some'}, "train.remat='some' is not one of"),
    ({'train__lora_rank': 2, 'train__lora_modules': 'mpl'}, "'mpl' matches none"),
    ({'train__eval_every': 5}, 'Set train.eval_share'),
    ({'train__patience': 2, 'train__eval_share': 0.1}, 'Set train.eval_every'),
    (
      {'train__schedule': 'wsd', 'train__warmup': 0.5, 'train__decay': 0.6},
      'add up to more than 1',
    ),
  ],
)
def test_invalid_setting_is_refused_before_any_work(fields, match, random_model, tmp_path):
  stages = ['generate', 'train', 'evaluate']
  refused(match, random_model, tmp_path, set_fields(**fields), stages)


def served(stage, **fields):
  """Fields of a model that nobody serves: no server has port 9."""
  url, words = 'http://127.0.0.1:9/v1', str(MODELS['tiny'])
  fields = {'url': url, 'model': 'm', 'tokenizer': words} | fields
  return {f'remote__{stage}__{name}': value for name, value in fields.items()}


@pytest.mark.parametrize(
  'fields, match',
  [
    (served('critique'), "remote.critique: remote 'm' at http://127.0.0.1:9/v1 is unreachable"),
    (served('revision', retries=-1), 'remote.revision: retries=-1'),
    (served('critique', tokenizer='/nowhere/at/all'), 'remote.critique: .*/nowhere/at/all'),
    (served('critique') | {'model__critique': 'tiny'}, "model.critique='tiny' and remote.critique"),
    (served('base'), "model.base='.*' and remote.base.url="),
    (served('base') | {'model__base': ''}, 'model.init is empty'),
    ({'model__base': ''}, 'model.base is empty'),
    (
      served('critique') | {'sampling__critique__top_k': 5},
      "remote.critique: server='openai' does not support top_k=5",
    ),
    (
      served('base', server='tgi', prompt='text')
      | {'model__base': '', 'sampling__revision__stop_token_ids': (7,)},
      "remote.base: server='tgi' does not support stop_token_ids",
    ),
  ],
)
def test_unusable_served_model_is_refused_before_any_work(fields, match, random_model, tmp_path):
  refused(match, random_model, tmp_path, set_fields(**fields), ['generate', 'train'])


def test_address_of_a_served_model_may_change_between_starts(random_model, tmp_path):
  def settings(**fields):
    config = small(random_model)
    set_fields(**served('critique', **fields))(config)
    return pipeline.build(config, tmp_path).settings('generate')

  assert settings() == settings(url='http://elsewhere/v1', timeout_seconds=5.0, retries=0)
  assert settings() != settings(model='n')
  assert settings() != settings(revision='2')
  assert 'remote' not in pipeline.build(small(random_model), tmp_path).settings('generate')


def test_unknown_stage_is_refused(random_model, tmp_path):
  refused('There is no stage tidy', random_model, tmp_path, lambda config: None, ['tidy'])
  refused('No stage is given', random_model, tmp_path, lambda config: None, [])


@pytest.mark.parametrize('name', ['critique', 'revision', 'init'])
def test_broken_checkpoint_is_refused_before_any_work(name, random_model, tmp_path):
  broken = tmp_path / 'broken'
  shutil.copytree(random_model, broken)
  weights = safetensors.numpy.load_file(broken / 'model.safetensors')
  del weights['model.layers.1.mlp.up_proj.weight']
  safetensors.numpy.save_file(weights, broken / 'model.safetensors', metadata={'format': 'pt'})
  change = set_fields(**{f'model__{name}': str(broken)})
  refused('model.layers.1.mlp.up_proj.weight', random_model, tmp_path / 'run', change, ['generate'])
  hf = json.loads((broken / 'config.json').read_text()) | {'model_type': 'gpt2'}
  (broken / 'config.json').write_text(json.dumps(hf))
  refused(
    "model_type 'gpt2' is not supported", random_model, tmp_path / 'run', change, ['generate']
  )


def test_unwritable_or_full_workdir_is_refused(random_model, tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='is not writable'):
    pipeline.run_stages(
      pipeline.build(small(random_model), tmp_path / 'file' / 'run'), ['generate']
    )
  usage = shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
  with pytest.raises(UserError, match='GB free, and the run needs'):
    pipeline.run_stages(pipeline.build(small(random_model), tmp_path / 'run'), ['generate'])


def test_a_warm_up_longer_than_the_longest_possible_training_is_refused_at_the_start(
  random_model, tmp_path
):
  def change(config):
    config.train.warmup, config.train.batch_size = 0.9, 8

  match = 'warmup=0.9 takes all at most [0-9]+ steps'
  refused(match, random_model, tmp_path, change, stages=('generate', 'train'))
