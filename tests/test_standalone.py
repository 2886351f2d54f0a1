"""Stages stand alone: training on another run's D_CAI, and evaluating any checkpoint."""

import json
import shutil

import pytest
import tensorflow_datasets as tfds

from cai_jax import pipeline
from cai_jax.data import d_cai
from cai_jax.runtime.errors import UserError
from tests.pipeline_setup import small

pytestmark = pytest.mark.usefixtures('single_device')


@pytest.fixture(scope='module')
def d_cai_folder(random_model, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('other')
  pipeline.run_stages(pipeline.build(small(random_model), workdir), ['generate'])
  return workdir / 'd_cai'


def without_training_prompts(model):
  config = small(model)
  config.prompts.harmful.source = config.prompts.helpful.source = ''
  return config


def test_training_on_another_runs_d_cai_needs_no_prompts(random_model, d_cai_folder, tmp_path):
  config = without_training_prompts(random_model)
  config.data.d_cai = str(d_cai_folder)
  run = pipeline.build(config, tmp_path)
  assert pipeline.default_stages(run) == ['train', 'evaluate', 'report']
  pipeline.run_stages(run, ['train'])
  assert (tmp_path / 'model' / 'model.safetensors').exists()
  assert not (tmp_path / 'd_cai').exists() and not (tmp_path / 'journal').exists()
  train = json.loads((tmp_path / 'manifest.json').read_text())['stages']['train']
  assert train['rows_in'] == 16 and set(train['settings']['data']) == {'d_cai'}
  pipeline.run_stages(run)
  page = (tmp_path / 'report.html').read_text()
  assert 'Quality of the revisions' not in page and 'tiny-train-baited' in page


def test_any_checkpoint_is_evaluated_without_training(random_model, tmp_path):
  config = without_training_prompts(random_model)
  config.model.aligned = 'tiny-small'
  run = pipeline.build(config, tmp_path)
  assert pipeline.default_stages(run) == ['evaluate', 'report']
  pipeline.run_stages(run)
  summary = json.loads((tmp_path / 'evaluation' / 'summary.json').read_text())
  assert summary['models']['aligned'] != summary['models']['base']
  assert 'tiny-eval-baited' in (tmp_path / 'report.html').read_text()
  stages = json.loads((tmp_path / 'manifest.json').read_text())['stages']
  assert set(stages) == {'evaluate', 'report'} and 'train' not in stages['evaluate']['settings']


def test_evaluation_needs_no_external_d_cai_once_training_is_done(
  random_model, d_cai_folder, tmp_path
):
  external, workdir = tmp_path / 'external', tmp_path / 'run'
  shutil.copytree(d_cai_folder, external)
  config = without_training_prompts(random_model)
  config.data.d_cai = str(external)
  pipeline.run_stages(pipeline.build(config, workdir), ['train'])
  (external / 'd_cai-train.array_record-00009').write_bytes(b'more')
  with pytest.raises(UserError, match='data.d_cai: '):
    pipeline.run_stages(pipeline.build(config, workdir), ['train'])
  shutil.rmtree(external)
  lines = []
  pipeline.run_stages(pipeline.build(config, workdir), log=lines.append)
  assert 'train: done before' in lines and (workdir / 'report.html').exists()
  with pytest.raises(UserError, match='data.d_cai: .* → None'):
    pipeline.run_stages(pipeline.build(small(random_model), workdir), ['generate', 'train'])


def test_dataset_with_another_schema_is_no_d_cai(random_model, tmp_path):
  features = tfds.features.FeaturesDict({'text': tfds.features.Text()})
  template = d_cai._filename_template(tmp_path / 'other')
  (tmp_path / 'other').mkdir()
  d_cai.shard_path(tmp_path / 'other', 0).write_bytes(b'')
  tfds.folder_dataset.write_metadata(
    data_dir=str(tmp_path / 'other'),
    features=features,
    split_infos=[tfds.core.SplitInfo('train', [0], 0, filename_template=template)],
    filename_template=template,
    check_data=False,
  )
  config = without_training_prompts(random_model)
  config.data.d_cai = str(tmp_path / 'other')
  with pytest.raises(UserError, match='data.d_cai: .* is not a D_CAI: 24 of its fields'):
    pipeline.run_stages(pipeline.build(config, tmp_path / 'run'), ['train'])


@pytest.mark.parametrize(
  ('stages', 'message'),
  [
    (['train'], 'Stage generate is not done in .*data.d_cai'),
    (['generate', 'evaluate'], 'Stage train is not done in .*model.aligned'),
    (['report'], 'Stage generate is not done in'),
  ],
)
def test_stage_without_its_input_names_both_remedies(random_model, tmp_path, stages, message):
  with pytest.raises(UserError, match=message):
    pipeline.run_stages(pipeline.build(small(random_model), tmp_path), stages)


@pytest.mark.parametrize(
  ('field', 'stages', 'message'),
  [
    ('data.d_cai', ['generate'], 'data.d_cai is set, and replaces the result of stage generate'),
    ('data.d_cai', ['train'], 'data.d_cai: .*holds no TFDS dataset'),
    ('model.aligned', ['train'], 'model.aligned is set, and replaces the result of stage train'),
    ('model.aligned', ['evaluate'], '/nowhere/at/all'),
  ],
)
def test_unusable_replacement_of_a_stage_is_refused(random_model, tmp_path, field, stages, message):
  config = small(random_model)
  config.update_from_flattened_dict({field: '/nowhere/at/all'})
  with pytest.raises(UserError, match=message):
    pipeline.run_stages(pipeline.build(config, tmp_path), stages)


def test_held_out_prompt_in_another_runs_d_cai_is_refused(random_model, d_cai_folder, tmp_path):
  config = without_training_prompts(random_model)
  config.data.d_cai = str(d_cai_folder)
  config.prompts.eval_harmful.split = 'train'
  with pytest.raises(UserError, match='data.d_cai: .*training'):
    pipeline.run_stages(pipeline.build(config, tmp_path), ['train'])
