"""Whole runs on eight prompts of each published set, in each format."""

import json

import pytest

from cai_jax import pipeline
from cai_jax.data import d_cai
from cai_jax.data.sets import PROMPT_SETS
from cai_jax.pipeline.report_chains import EVALUATION_ROWS
from configs import default
from tests.pipeline_setup import small
from tests.prompt_set_files import FORMATS, load, write_copy

pytestmark = pytest.mark.slow


def run_all_stages(model, name, path, workdir):
  """Run all stages on eight prompts of a set; return the run and its rows of harmful prompts."""
  config = small(model)
  published = default.get_config().prompts.harmful
  published.update(source=name, path=str(path), limit=8)
  config.prompts.harmful = published
  config.evaluation.scorer = 'none'  # the oracle knows requests of the embedded world only
  config.evaluation.scores = ('refused', 'off_topic', 'looping', 'changed', 'truncated')
  config.feedback.rounds = 1
  for stage in config.sampling.values():
    stage.max_tokens = 4
  run = pipeline.build(config, workdir)
  pipeline.run_stages(run)
  rows = d_cai.read_rows(workdir / 'd_cai')
  return run, [row for row in rows if row['kind'] == 'harmful']


@pytest.mark.parametrize('name', list(PROMPT_SETS))
def test_a_set_runs_end_to_end_in_every_format(name, random_model, tmp_path, monkeypatch):
  """All formats of a set give the published prompts, the same rows, an evaluation and a report."""
  monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
  published = read_prompts(name)
  by_form = {}
  for form in FORMATS:
    path = write_copy(name, form, tmp_path / 'copies' / form)
    assert read_prompts(name, path) == published, form
    run, by_form[form] = run_all_stages(random_model, name, path, tmp_path / form)
    assert [row['id'] for row in by_form[form]] == [id for id, *_ in published], form
    assert {json.loads(row['metadata'])['set'] for row in by_form[form]} == {name}, form
    manifest = json.loads((run.workdir / 'manifest.json').read_text())
    assert list(manifest['stages']) == pipeline.default_stages(run), form
    assert manifest['stages']['train']['steps'] >= 1, form
    scored = (run.workdir / EVALUATION_ROWS).read_text().splitlines()
    held_out = {prompt.id for prompt in run.prompts['eval_harmful']}
    assert {json.loads(line)['id'] for line in scored} >= held_out, form
    assert (run.workdir / 'report.html').stat().st_size > 10_000, form
  texts = {form: texts_of(rows) for form, rows in by_form.items()}
  assert all(found == texts[FORMATS[0]] for found in texts.values())


def read_prompts(name, path=None):
  """Return all that is read of a set's prompts, by default of its published form."""
  return [(prompt.id, prompt.messages, prompt.metadata) for prompt in load(name, path)]


def texts_of(rows):
  """Return what rows have besides log-probabilities, whose NaN equals nothing."""
  return [(row['prompt'], row['metadata'], row['rounds'][-1]['revision']['text']) for row in rows]
