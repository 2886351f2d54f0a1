"""Stage `label` within runs: its files, what a second start asks, and what learns from it."""

import json
import shutil

import numpy as np
import pytest

import cai_jax
from cai_jax import pipeline
from cai_jax.data import d_cai
from cai_jax.pipeline import stages
from cai_jax.runtime.manifest import Manifest
from cai_jax.scoring.judge import JUDGES
from cai_jax.tiny.judge import judge_with_oracle, make_labelled
from tests.label_setup import write_lines
from tests.pipeline_setup import set_fields, small
from tests.test_preference_stages import with_preferences

LABELS = {
  'label__responses': 2,
  'label__labelled': ('tiny',),
  'label__labelled_limit': 4,
  'reward__data': 'labels',
  'prefer__data': 'labels',
  'prefer__compare': (),
}
MADE = (
  *('labels/comparisons.jsonl', 'labels/summary.json', 'reward_model/model.safetensors'),
  *('policy/model.safetensors', 'evaluation/summary.json', 'evaluation/rows.jsonl'),
)

pytestmark = pytest.mark.usefixtures('single_device')


def test_a_judge_of_a_run_is_asked_nothing_twice(random_model, tmp_path, restored_registries):
  asked = []

  def judge(matches):
    asked.extend(match.responses for match in matches)
    return judge_with_oracle(matches)

  JUDGES.register('counting')(lambda loader: judge)
  rows = [{'id': str(i), **row} for i, row in enumerate(make_labelled(6))]
  given, workdir = write_lines(tmp_path / 'pairs.jsonl', rows), tmp_path / 'run'
  config = small(random_model)
  set_fields(
    label__comparisons=(given,), label__model='counting', model__aligned=str(random_model)
  )(config)
  pipeline.run_stages(pipeline.build(config, workdir), ['label'])
  manifest = json.loads((workdir / 'manifest.json').read_text())
  assert manifest['stages']['label']['accuracy'][given]['right'] == 6 == len(asked)
  labels = (workdir / 'labels' / 'comparisons.jsonl').read_bytes()
  assert labels.count(b'\n') == 6
  # As if the run had been killed at the end of the stage.
  shutil.rmtree(workdir / 'labels')
  del manifest['stages']['label']
  (workdir / 'manifest.json').write_text(json.dumps(manifest))
  pipeline.run_stages(pipeline.build(config, workdir), ['label'])
  assert (workdir / 'labels' / 'comparisons.jsonl').read_bytes() == labels and len(asked) == 6


@pytest.fixture(scope='module')
def finished(random_model, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('labels')
  pipeline.run_stages(pipeline.build(with_preferences(random_model, **LABELS), workdir))
  return workdir


class KilledError(Exception):
  """Ends a run where a test would kill it."""


@pytest.mark.slow
def test_a_whole_run_with_ai_labels(finished):
  manifest = json.loads((finished / 'manifest.json').read_text())['stages']
  assert list(manifest) == ['generate', 'train', 'label', 'prefer', 'evaluate', 'report']
  rows = [json.loads(x) for x in (finished / MADE[0]).read_text().splitlines()]
  assert len(rows) == manifest['label']['pairs'] > 0
  assert all(0.5 <= row['probability'] <= 1 and row['source'] == 'label' for row in rows)
  for name in ('reward_model', 'policy'):
    assert manifest['prefer'][name]['pairs']['read']['rows'] == len(rows), name
  assert manifest['label']['accuracy']['tiny']['count'] == 4
  summary = json.loads((finished / 'evaluation' / 'summary.json').read_text())
  assert list(summary['models']) == ['base', 'aligned', 'best_of_reward', 'policy']
  assert 'of &#x27;labels&#x27;' in (finished / 'report.html').read_text()


@pytest.mark.slow
def test_a_run_that_was_killed_before_prefer_ends_with_the_same_bytes(
  finished, random_model, tmp_path, monkeypatch
):
  def kill(run, manifest):
    raise KilledError

  build = lambda: pipeline.build(with_preferences(random_model, **LABELS), tmp_path)  # noqa: E731
  with monkeypatch.context() as patch:
    patch.setitem(stages.STAGES, 'prefer', kill)
    with pytest.raises(KilledError):
      pipeline.run_stages(build())
  manifest = Manifest(tmp_path, writes=False)
  assert list(filter(manifest.done, stages.STAGES)) == ['generate', 'train', 'label']
  assert not (tmp_path / 'policy').exists()
  turns = [path.read_bytes() for path in sorted((tmp_path / 'journal').glob('turns-*'))]
  labels = (tmp_path / MADE[0]).read_bytes()
  pipeline.run_stages(build())
  for name in MADE:
    assert (tmp_path / name).read_bytes() == (finished / name).read_bytes(), name
  assert (tmp_path / MADE[0]).read_bytes() == labels
  grown = [path.read_bytes() for path in sorted((tmp_path / 'journal').glob('turns-*'))]
  assert all(new.startswith(old) for new, old in zip(grown, turns, strict=True))


@pytest.mark.slow
def test_fine_tuning_on_the_best_answers_is_a_run_like_any_other(finished, random_model, tmp_path):
  """Rejection sampling: `train` learns the answers that the reward model likes best."""
  shutil.copytree(finished / 'best_of_n', tmp_path / 'best_of_n')
  fields = {
    'data__d_cai': str(tmp_path / 'best_of_n'),
    'train__target': 'initial',
    'reward__data': '',
    'reward__best_of_n': 0,
    'prefer__data': '',
    'prefer__compare': (),
    'evaluation__reward_model': '',
    'evaluation__reward_labelled': '',
    'evaluation__baselines': (),
    'evaluation__best_of_n': 0,
  }
  config = with_preferences(random_model)
  set_fields(**fields)(config)
  run = pipeline.build(config, tmp_path / 'run')
  assert pipeline.default_stages(run) == ['train', 'evaluate', 'report']
  pipeline.run_stages(run)
  manifest = json.loads((tmp_path / 'run' / 'manifest.json').read_text())['stages']
  rows = d_cai.read_rows(tmp_path / 'best_of_n')
  kinds = [row['kind'] for row in rows]
  assert manifest['train']['rows_kept'] >= kinds.count('harmful') == 10
  base, trained = cai_jax.load(random_model), cai_jax.load(tmp_path / 'run' / 'model')
  tokens = np.arange(5, 21)[None]
  assert np.abs(trained.logits(tokens) - base.logits(tokens)).max() > 0
  summary = json.loads((tmp_path / 'run' / 'evaluation' / 'summary.json').read_text())
  assert list(summary['models']) == ['base', 'aligned']
