"""A finished run that the tests of publishing share."""

import json
import shutil

import huggingface_hub
import pytest

from cai_jax.data import d_cai, quality, quality_summary
from cai_jax.data.preferences import write_preferences
from cai_jax.model.folder import folder_contents
from cai_jax.pipeline import build
from cai_jax.publishing.command import make_request
from cai_jax.runtime.files import write_json
from cai_jax.tiny.files import MODELS
from configs import tiny
from tests.test_report_chains import write_dataset

RATE = {'violation_rate': 0.5, 'violation_rate_interval': [0.25, 0.75], 'count': 8}


DIFFERENCE = {'to': 'base', 'value': -0.25, 'interval': [-0.5, -0.1], 'p_value': 0.01}


DIFFERENCE['adjusted_p_value'] = 0.02


SUMMARY = {
  'models': {
    'base': RATE | {'mean_tokens': 12.5},
    'aligned': RATE | {'mean_tokens': 9.5, 'differences': {'violation_rate': DIFFERENCE}},
  },
}


REQUEST = make_request('me/thing')


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """The folder of a run as its stages leave it, with the embedded model in place of M_aligned."""
  folder = tmp_path_factory.mktemp('runs') / 'finished'
  config = tiny.get_config()
  config.prompts.harmful.limit = 3
  run = build(config, folder)
  texts = {'a': 'Fine <b>.', 'b': 'Worse.', 'c': 'Long.'}
  write_dataset(folder / 'd_cai', texts, rounds=2)
  d_cai.write_checksums(folder / 'd_cai')
  rows = d_cai.read_rows(folder / 'd_cai')
  counts = write_preferences(folder / 'preferences.jsonl', rows)
  references = quality.build_references({'p': ('Ask.', 'Ask again.')}, ())
  write_json(folder / 'quality.json', {'d_cai': quality_summary.summarize(rows, references)})
  shutil.copytree(MODELS['tiny'], folder / 'model')
  (folder / 'evaluation').mkdir()
  write_json(folder / 'evaluation' / 'summary.json', SUMMARY)
  write_json(folder / 'evaluation' / 'models.json', {})
  (folder / 'metrics.jsonl').write_text('{"step": 1, "loss": 2.0}\n')
  done = {'finished': '2030-01-01', 'seconds': 1.0, 'peak_memory_bytes': 1, 'git_commit': 'abc+'}
  done['environment'] = {
    'cai_jax': '1.2',
    'packages': {'jax': '0.10'},
    'devices': {'count': 8, 'kind': 'H100'},
  }
  done['paths'] = {}
  used = {'settings': {'constitution': run.constitution.fingerprint()}}
  stages = {
    'generate': used | {'d_cai': d_cai.content_digest(folder / 'd_cai'), 'preferences': counts},
    'train': {'model': folder_contents(folder / 'model'), 'examples': 3, 'steps': 1},
    'evaluate': {},
  }
  manifest = {
    'version': 2,
    'stages': {name: entry | done for name, entry in stages.items()},
    'versions': {'jax': '0.99'},  # of the last start, which wrote a report on another machine
    'devices': {'count': 1, 'kind': 'cpu'},
  }
  write_json(folder / 'config.json', run.values)
  write_json(folder / 'manifest.json', manifest)
  return folder


@pytest.fixture
def run(finished, tmp_path):
  """A copy of the run that a test may change."""
  shutil.copytree(finished, tmp_path / 'run')
  return tmp_path / 'run'


def change(path, edit):
  content = json.loads(path.read_text())
  edit(content)
  path.write_text(json.dumps(content))


def read_card(folder):
  """Return the metadata and the text of a card."""
  text = (folder / 'README.md').read_text('utf-8')
  metadata = huggingface_hub.RepoCard(text).data.to_dict()
  return metadata, text.split('---\n', 2)[2]
