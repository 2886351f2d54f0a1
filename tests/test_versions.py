"""Versions: older folders continue, newer ones are refused."""

import json
import pathlib
import shutil

import pytest
from ml_collections import ConfigDict

from cai_jax import pipeline
from cai_jax.runtime.errors import StoppedError, UserError
from cai_jax.runtime.manifest import VERSION, Manifest
from tests.pipeline_setup import small

VERSION_1 = pathlib.Path(__file__).parent / 'data' / 'version_1'  # written by version 0.1.0


@pytest.fixture
def version_1(tmp_path):
  """Return a folder of version 1 whose generate stage is done, and its config."""
  for path in VERSION_1.iterdir():
    shutil.copy(path, tmp_path)
  config = ConfigDict(json.loads((VERSION_1 / 'config.json').read_text()))
  config.engine.slots = 8  # the folder was written with one device, and the tests have eight
  return tmp_path, config


def test_folder_of_version_1_continues_with_its_own_config(version_1):
  workdir, config = version_1
  assert 'version' not in config
  run, lines = pipeline.build(config, workdir), []
  pipeline.run_stages(run, ['generate'], lines.append)
  assert lines == ['generate: done before']
  assert json.loads((workdir / 'config.json').read_text())['version'] == VERSION


def test_manifest_of_version_1_is_migrated_by_the_next_write(version_1):
  workdir, _ = version_1
  before = json.loads((workdir / 'manifest.json').read_text())
  with Manifest(workdir).stage('train', {}):
    pass
  after = json.loads((workdir / 'manifest.json').read_text())
  assert after['version'] == VERSION and 'version' not in before
  assert after['stages']['generate'] == before['stages']['generate']


def test_other_settings_in_a_folder_of_version_1_are_refused(version_1):
  workdir, config = version_1
  config.feedback.rounds = 1
  with pytest.raises(UserError, match='feedback.rounds: 2 → 1'):
    pipeline.run_stages(pipeline.build(config, workdir), ['generate'])


def test_folder_and_config_of_a_newer_version_are_refused(random_model, tmp_path):
  message = f'has version {VERSION + 1}, and this cai_jax reads versions 1 to {VERSION}'
  (tmp_path / 'manifest.json').write_text(json.dumps({'version': VERSION + 1, 'stages': {}}))
  with pytest.raises(UserError, match=f'manifest.json {message}'):
    Manifest(tmp_path)
  config = small(random_model)
  config.version = VERSION + 1
  with pytest.raises(UserError, match=f'the config {message}'):
    pipeline.build(config, tmp_path)


@pytest.mark.parametrize(
  ('error', 'kept'), [(UserError, False), (StoppedError, True), (RuntimeError, True)]
)
def test_only_a_refused_stage_is_forgotten(tmp_path, error, kept):
  manifest = Manifest(tmp_path)
  with pytest.raises(error), manifest.stage('train', {'seed': 0}):
    raise error('why')
  assert ('train' in json.loads((tmp_path / 'manifest.json').read_text())['stages']) == kept


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('{', 'manifest.json is not valid JSON'),
    ('1' * 5000, 'manifest.json is not valid JSON'),
    ('[]', 'manifest.json contains a list'),
    ('{"version": "x", "stages": {}}', 'manifest.json has version x'),
    ('{"version": null, "stages": {}}', 'manifest.json has version None'),
    ('{"version": 2}', 'manifest.json does not describe the stages'),
    ('{"stages": {"train": 3}}', 'manifest.json does not describe the stages'),
  ],
)
def test_damaged_manifest_is_refused(tmp_path, content, message):
  (tmp_path / 'manifest.json').write_text(content)
  with pytest.raises(UserError, match=message):
    Manifest(tmp_path)


def test_free_settings_may_change_once_a_stage_is_done(tmp_path):
  manifest = Manifest(tmp_path)
  manifest.content['stages']['train'] = {'settings': {'seed': 0, 'plugins': ['a']}}
  changed = {'seed': 0, 'plugins': ['b']}
  with pytest.raises(UserError, match='plugins'):
    manifest.check('train', changed, free_when_done=['plugins'])
  manifest.content['stages']['train']['finished'] = 'now'
  manifest.check('train', changed, free_when_done=['plugins'])
  with pytest.raises(UserError, match='seed'):
    manifest.check('train', changed | {'seed': 1}, free_when_done=['plugins'])
