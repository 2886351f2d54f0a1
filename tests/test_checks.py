"""What a run refuses before any work."""

import dataclasses
import importlib.metadata
import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from packaging.requirements import Requirement

from cai_jax import pipeline
from cai_jax.model import lm as models
from cai_jax.pipeline import space
from cai_jax.runtime import packages
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.registry import temporary_registrations
from cai_jax.scoring.scorer import SCORERS
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
    ({'report__published': 'nowhere.jsonl'}, 'nowhere.jsonl: there is no such file'),
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
    (
      {'feedback__rounds': 30, 'feedback__context': 'growing'},
      r'tiny, prompt [\w-]+: the chain of this prompt can reach',
    ),
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
    ({'model__long_context': True}, 'holds .* has no longrope scaling for a longer one'),
    ({'model__dtype': 'float33'}, "model.dtype='float33' is not supported"),
    ({'feedback__style': 'odd'}, "feedback: style='odd' must be one of"),
    (
      {'feedback__template_options': (('a', 1), ('a', 2))},
      'template_options=.* must be pairs with distinct names',
    ),
    ({'evaluation__style': 'odd'}, "evaluation.style='odd': "),
    ({'evaluation__reward_label': 'x'}, "reward_label='x' has no effect, .*reward_model is empty"),
    ({'evaluation__refusal_label': 'x'}, "refusal_label='x' has no effect, .* names no checkpoint"),
    ({'evaluation__swap': True}, 'evaluation.swap=True has no effect'),
    ({'evaluation__multiple_choice': ('a', 'a')}, 'multiple_choice=.* names a file twice'),
    ({'train__probes': 9}, 'train.probes=9 needs as many held-out prompts, but there are 8'),
    ({'remote__base__model': 'm'}, 'remote.base.model has no effect, because remote.base.url is'),
    ({'train__attention': 'splash'}, "train.attention: attention 'splash' runs on TPUs only"),
    ({'train__remat': 'some'}, "train.remat='some' is not one of"),
    ({'train__lora_rank': 2, 'train__lora_modules': 'mpl'}, "'mpl' matches none"),
    ({'train__base_weights': 'int8'}, "base_weights='int8' has no effect without adapters"),
    ({'train__base_weights': 'int3'}, "train.base_weights='int3' is not one of .*'int8', 'nf4'"),
    ({'model__weights': 'int3'}, "model.weights='int3' is not one of"),
    ({'train__lora_rank': 2, 'train__lora_init': 'x'}, 'train.lora_init=.* has no adapter_config'),
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
      served('critique') | {'sampling__critique__max_thought_tokens': 5},
      "remote.critique: server='openai' does not support max_thought_tokens=5",
    ),
    (
      {'sampling__revision__max_thought_tokens': 5},
      'sampling.revision: max_thought_tokens=5 .* writes none',
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
  hf = json.loads((broken / 'config.json').read_text()) | {'model_type': 'gptj'}
  (broken / 'config.json').write_text(json.dumps(hf))
  refused(
    "model_type 'gptj' is not supported", random_model, tmp_path / 'run', change, ['generate']
  )


def test_unwritable_or_full_workdir_is_refused(random_model, tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='is not writable'):
    pipeline.run_stages(
      pipeline.build(small(random_model), tmp_path / 'file' / 'run'), ['generate']
    )
  usage = shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
  with pytest.raises(UserError, match='free, and the run needs up to'):
    pipeline.run_stages(pipeline.build(small(random_model), tmp_path / 'run'), ['generate'])


def test_a_warm_up_longer_than_the_longest_possible_training_is_refused_at_the_start(
  random_model, tmp_path
):
  def change(config):
    config.train.warmup, config.train.batch_size = 0.9, 8

  match = 'warmup=0.9 takes all at most [0-9]+ steps'
  refused(match, random_model, tmp_path, change, stages=('generate', 'train'))


@pytest.fixture(scope='module')
def classifier(random_model, tmp_path_factory):
  """`classifier(labels, **changes)` returns the folder of a classifier with a changed config."""

  def make(*labels, **changes):
    folder = tmp_path_factory.mktemp('classifiers') / 'model'
    shutil.copytree(random_model, folder)
    hf = json.loads((folder / 'config.json').read_text())
    hf |= {'architectures': ['LlamaForSequenceClassification']} | changes
    hf['id2label'] = {str(i): label for i, label in enumerate(labels)}
    (folder / 'config.json').write_text(json.dumps(hf))
    weights = safetensors.numpy.load_file(folder / 'model.safetensors')
    weights['score.weight'] = np.zeros((len(labels), hf['hidden_size']), np.float32)
    safetensors.numpy.save_file(weights, folder / 'model.safetensors', metadata={'format': 'pt'})
    return folder

  return make


ALL = ['generate', 'train', 'evaluate']


@pytest.mark.parametrize('field', ['reward_model', 'refusal'])
def test_unusable_classifier_is_refused_before_any_work(field, classifier, random_model, tmp_path):
  label = {'reward_model': 'reward_label', 'refusal': 'refusal_label'}[field]

  def check(match, folder, **fields):
    fields = {f'evaluation__{field}': str(folder)} | fields
    refused(match, random_model, tmp_path / 'run', set_fields(**fields), ALL)

  two = classifier('good', 'bad')
  check(f"evaluation.{label}: label=None is not one of the 2 labels .*'good', 'bad'", two)
  check(f"evaluation.{label}: label='odd'", two, **{f'evaluation__{label}': 'odd'})
  check(f'evaluation.{field}: ', tmp_path / 'nowhere' / 'at all')
  check(f"evaluation.{field}: .*model_type 'gptj'", classifier('one', model_type='gptj'))
  check(f'evaluation.{field}: .*architectures', classifier('one', architectures=['Odd']))
  short = classifier('one', max_position_embeddings=24)
  check(f'evaluation.{field}=.* has .* tokens, and 1 response.* but its context holds 24', short)
  (two / 'tokenizer.json').unlink()
  check(f'evaluation.{field}: .*tokenizer', two)
  headless = classifier('one')
  weights = safetensors.numpy.load_file(headless / 'model.safetensors')
  del weights['score.weight']
  safetensors.numpy.save_file(weights, headless / 'model.safetensors', metadata={'format': 'pt'})
  check(f"evaluation.{field}: .*'score.weight' is missing", headless)
  untemplated = classifier('one')
  (untemplated / 'chat_template.jinja').unlink()
  check(f'evaluation.{field}=.*chat template', untemplated)


def test_usable_classifier_passes_every_check(classifier, random_model, tmp_path):
  config = small(random_model)
  config.evaluation.reward_model = str(classifier('one'))
  config.evaluation.refusal = str(classifier('answers', 'refuses'))
  config.evaluation.refusal_label = 'refuses'
  pipeline.check_run(pipeline.build(config, tmp_path), ALL)


def test_judge_and_questions_that_do_not_fit_are_refused_before_any_work(random_model, tmp_path):
  fields = {'evaluation__judge': 'base', 'sampling__initial__max_tokens': 200}
  match = 'evaluation.judge=.*2 response.* up to sampling.initial.max_tokens=200 each.* holds 512'
  refused(match, random_model, tmp_path, set_fields(**fields), ALL)
  path = tmp_path / 'questions.jsonl'
  good = {'prompt': 'Is it red?', 'corrects': [' yes'], 'incorrects': [' no']}
  long = good | {'prompt': 'red ' * 600}
  path.write_text(f'{json.dumps(good)}\n{json.dumps(long)}\n')
  change = set_fields(evaluation__multiple_choice=(str(path),))
  match = 'evaluation.multiple_choice: .*questions.jsonl:2 has .* but the context of .* holds 512'
  refused(match, random_model, tmp_path, change, ALL)


def test_scorer_that_lacks_its_model_is_refused_before_any_work(random_model, tmp_path):
  with temporary_registrations():
    SCORERS.register('guard')(lambda loader: loader.language_model('/nowhere/at/all'))
    match = "evaluation, measure 'verdicts': .*/nowhere/at/all"
    refused(match, random_model, tmp_path, set_fields(evaluation__scorer='guard'), ALL)
    SCORERS.register('good guard')(lambda loader: loader.language_model('base').no_attribute)
    config = small(random_model)
    config.evaluation.scorer = 'good guard'
    pipeline.check_run(pipeline.build(config, tmp_path), ALL)


def test_missing_result_of_a_finished_stage_is_refused_before_any_work(random_model, tmp_path):
  entry = {'finished': 'now', 'settings': {}, 'seconds': 1.0, 'peak_memory_bytes': 1}
  content = {'version': 2, 'stages': {'generate': entry, 'train': entry}}
  (tmp_path / 'manifest.json').write_text(json.dumps(content))
  run = pipeline.build(small(random_model), tmp_path)
  with pytest.raises(UserError, match='model/config.json is missing, but stage train is done'):
    pipeline.check_run(run, [*ALL, 'report'])
  with pytest.raises(UserError, match='quality.json is missing, but stage generate is done'):
    pipeline.check_run(run, ['report'])


@pytest.mark.parametrize('name', ['journal', 'd_cai', 'tensorboard', 'profile', 'model'])
def test_part_of_a_run_that_is_no_folder_is_refused(name, random_model, tmp_path):
  (tmp_path / name).write_text('')
  run = pipeline.build(small(random_model), tmp_path)
  with pytest.raises(UserError, match=f'{tmp_path / name} is not writable'):
    pipeline.check_run(run, ALL)


def test_space_is_estimated_by_part_and_checked_for_each_disk(random_model, tmp_path, monkeypatch):
  run = pipeline.build(small(random_model), tmp_path / 'run')
  run = dataclasses.replace(run, journal=tmp_path / 'journal')
  shape = models.inspect_model(random_model).config
  needs = {need.part: need for need in space.estimate_space(run, ALL, shape)}
  # 10 chains of 12 + 2 (9 + 12) tokens, 6 answers; 5 held-out chains and 3 answers, and 8 answers
  # of M_aligned.
  tokens = 10 * 54 + 6 * 12 + 5 * 54 + 3 * 12 + 8 * 12
  turns = 10 * 5 + 6 + 5 * 5 + 3 + 8
  journal = turns * space.TURN_BYTES + tokens * space.JOURNAL_TOKEN_BYTES
  assert needs['journal'] == ('journal', tmp_path / 'journal', journal)
  assert needs['model'].bytes == 4 * shape.num_params
  assert needs['checkpoints'].bytes == 4 * shape.num_params * 3 * 3
  assert {need.part for need in space.estimate_space(run, ['evaluate'], shape)} == {
    'journal',
    'D_CAI and evaluation',
    'logs and report',
  }
  (tmp_path / 'run' / 'model').mkdir(parents=True)
  (tmp_path / 'run' / 'model' / 'weights').write_bytes(b'x' * 1000)
  left = {need.part: need.bytes for need in space.estimate_space(run, ALL, shape)}
  assert left['model'] == needs['model'].bytes - 1000  # a run that continues replaces it
  monkeypatch.setattr(space, 'free_bytes', lambda folder: 1_000_000)
  with pytest.raises(UserError, match=r'1.0 MB free, .*: journal .* MB, .*checkpoints .* MB'):
    space.check_space(needs.values())


def test_package_that_is_missing_or_too_old_is_refused(random_model, tmp_path, monkeypatch):
  real = importlib.metadata.version

  def version(name):
    if name == 'grain':
      raise importlib.metadata.PackageNotFoundError(name)
    return '0.1' if name == 'jax' else real(name)

  run = pipeline.build(small(random_model), tmp_path)
  packages.check_packages()
  assert {'jax', 'transformers'} <= {requirement.name for requirement in packages.requirements()}
  monkeypatch.setattr(packages.importlib.metadata, 'version', version)
  with pytest.raises(UserError, match='grain is not installed, and cai_jax needs grain>='):
    pipeline.check_run(run, ALL)
  monkeypatch.setattr(packages, 'requirements', lambda: [Requirement('jax>=0.10.2')])
  with pytest.raises(UserError, match='jax has version 0.1, but cai_jax needs jax>=0.10.2'):
    packages.check_packages()
