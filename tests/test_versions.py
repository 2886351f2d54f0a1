"""Versions: older folders continue, newer ones are refused."""

import json

import pytest

from cai_jax import pipeline
from cai_jax.runtime.errors import StoppedError, UserError
from cai_jax.runtime.manifest import VERSION, Manifest
from tests.pipeline_setup import small

ADDED = {'train': ('loss',)}  # fields of recorded sections that version 1 did not have


def make_version_1(workdir):
  """Remove from a folder what version 1 did not write."""
  manifest = json.loads((workdir / 'manifest.json').read_text())
  manifest.pop('version', None)  # only written once a stage has run
  for entry in manifest['stages'].values():
    for section, names in ADDED.items():
      for name in names:
        entry['settings'].get(section, {}).pop(name, None)
  (workdir / 'manifest.json').write_text(json.dumps(manifest))
  config = json.loads((workdir / 'config.json').read_text())
  for name in ('version', 'plugins', 'data'):
    config.pop(name, None)
  (workdir / 'config.json').write_text(json.dumps(config))


def test_folder_of_version_1_continues_and_is_migrated(random_model, tmp_path):
  run = pipeline.build(small(random_model), tmp_path)
  pipeline.run_stages(run, ['generate', 'train'])
  assert json.loads((tmp_path / 'config.json').read_text())['version'] == VERSION
  make_version_1(tmp_path)
  lines = []
  pipeline.run_stages(run, ['generate', 'train'], lines.append)
  assert lines == ['generate: done before', 'train: done before']

  make_version_1(tmp_path)
  manifest = json.loads((tmp_path / 'manifest.json').read_text())
  del manifest['stages']['train']
  (tmp_path / 'manifest.json').write_text(json.dumps(manifest))
  lines.clear()
  pipeline.run_stages(run, ['generate', 'train'], lines.append)
  assert lines[:2] == ['generate: done before', 'train ...']
  assert json.loads((tmp_path / 'manifest.json').read_text())['version'] == VERSION


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
